"""Heads of the card that classify by text, and that detect what is out of distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.evaluation.features import Features, ImageChoice
from mmsae.evaluation.images import ImageChange
from mmsae.evaluation.ood.classifiers import at_classifier, classifiers, logits_of, whose_logits
from mmsae.evaluation.ood.detectors import Head
from mmsae.evaluation.ood.fit import FitImages
from mmsae.evaluation.ood.head import ood_head
from mmsae.evaluation.ood.sets import generated, shared_classes
from mmsae.evaluation.options import KINDS, RANDOM, Detection
from mmsae.evaluation.rows import TRAINED
from mmsae.evaluation.suite import NotApplicable, head
from mmsae.evaluation.suite_data import HeadResult, SuiteData
from mmsae.evaluation.zeroshot.head import LabelledScores, at_embedding, zero_shot_head
from mmsae.evaluation.zeroshot.scores import zero_shot_scores
from mmsae.metrics.choice import edge_warning
from mmsae.metrics.host.ood import roc
from mmsae.types import IMAGE, TEXT, InputError

SHOWN = ("energy", "mds", "recon")  # detectors whose curves are drawn


@head
def zeroshot(data: SuiteData, concept: str = "code") -> HeadResult:
    """Zero-shot classification: raw, reconstructions, codes, and concepts added with a weight chosen elsewhere."""
    prompts = data.prompts
    if TEXT not in data.sae.modalities:
        raise NotApplicable("the SAE has no text side, so classes have no codes")
    test, val = data.labelled("test"), data.labelled("val" if "val" in data.suite.data else "train")
    rows, more, edges = [], {}, []
    for control, sae in ((TRAINED, data.sae), (RANDOM, data.random)):
        at, tune = (LabelledScores(zero_shot_scores(sae, f.x, prompts), f.labels) for f in (test, val))
        found = zero_shot_head(at, tune, concept=concept, name="test", control=control, seed=data.seed)
        rows += [r for r in found.rows if not control or r["features"] != "raw"]
        edges += found.edges
        more[control or "trained"] = {"alpha": found.alpha, "tuning": {str(k): v for k, v in found.tuning.items()}}
    note = (
        f"{len(test.names)} classes; alpha of *enhanced*, chosen on {val.n:,} other images: {more['trained']['alpha']}."
    )
    return HeadResult(rows, more, [note], edge_warning(edges))


def _ood_validation(data: SuiteData, val: Features) -> tuple[Features, str]:
    if names := data.named("val_ood"):
        if len(names) > 1:
            raise InputError(
                f"{data.suite.path}: {len(names)} sets have the role val_ood ({', '.join(names)}), one is used"
            )
        return data.features(names[0]), f"the set {names[0]}"
    choice = ImageChoice("", keep=set(val.uids).__contains__)
    made = data.load(data.suite.paths("val"), choice, "ood validation", ImageChange(generated, "generated"))
    return made, "ID validation images scrambled, and noise of their colours"


@head
def ood(
    data: SuiteData,
    scores: Sequence[str] = Detection.scores,
    kinds: Sequence[str] = KINDS,
    controls: Sequence[str] = Detection.controls,
    logits: str = "auto",
) -> HeadResult:
    """OOD detection: every detector on raw features, code, reconstruction and residual, beside its controls."""
    far, near = data.named("ood"), data.named("near_ood")
    if not far + near:
        raise NotApplicable("the suite has no data with role ood or near_ood")
    if "val" not in data.suite.data:
        raise NotApplicable("the suite has no val set, on which settings are chosen")
    train, val, test = (data.labelled(n) for n in ("train", "val", "test"))
    val_ood, said = _ood_validation(data, val)
    heads, of_controls = _classifiers(data, logits)
    if data.quick:
        scores = [s for s in scores if s in ("msp", "energy", "mds", "knn", "recon", "cap_spearman", "rarity")]
    sets = {n: data.features(n) for n in far + near}
    again = (lambda _, f: f.through(f.others[RANDOM])) if data.token_site() else None
    detection = Detection(logits, tuple(kinds), tuple(scores), tuple(controls))
    found = ood_head(FitImages(train, val, val_ood, heads), test, sets, detection, sae=data.sae, near=near,
                     random=again, heads=of_controls, seed=data.seed)  # fmt: skip
    notes = [f"Settings were chosen on {said}. AUPRs are in results.json.", *found.notes]
    for name, shared in shared_classes(train, sets).items():
        notes.append(
            f"**OOD set {name} has classes of the ID set**: {', '.join(shared[:10])}; exclude leaves them out."
        )
    more = {"logits": logits_of(kinds, heads, len(train.names)), "fitted_on": train.n, "chosen": found.chosen}
    more["roc"] = _curves(found.conf, far + near)
    return HeadResult(found.rows, more, notes, edge_warning(found.edges))


def _classifiers(data: SuiteData, logits: str) -> tuple[dict[str, Head], dict[str, dict[str, Head]]]:
    """Classifiers of the SAE's features and of its controls, where they are not linear probes."""
    whose = whose_logits(logits, data.host, names=logits == "zeroshot")
    read = {"host": at_classifier(data.sae, data.host), "zeroshot": at_embedding(data.sae), "probe": True}[whose]
    if not read and logits != "auto":
        raise NotApplicable(f"{data.sae.sites[IMAGE].module} is not what the classifier ({logits}) reads")
    return classifiers(whose if read else "probe", data.sae, data.host, data.random, lambda: data.prompts)


def _curves(conf: Any, names: Sequence[str]) -> dict[str, dict[str, list[list[float]]]]:
    """``{set: {detector: [fpr, tpr]}}`` of a few detectors, at 100 points."""
    shown = {k: conf[k] for k in (("", s, kind) for kind in ("raw", "code", "codes") for s in SHOWN) if k in conf}
    return {n: {f"{s} on {k}": _thin(roc(c["id"], c[n])) for (_, s, k), c in shown.items()} for n in names}


def _thin(curve: tuple[Tensor, Tensor], most: int = 100) -> list[list[float]]:
    at = torch.linspace(0, len(curve[0]) - 1, min(most, len(curve[0]))).long()
    return [c[at].tolist() for c in curve]

"""OOD detection as one head: every detector on raw features, codes, reconstruction and residual, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import Features, with_sae
from mmsae.evaluation.ood import detectors as d
from mmsae.evaluation.ood.fit import FitImages, Fitted, fit_detectors
from mmsae.evaluation.options import NATIVE, PCA, RANDOM, STATISTICS, Detection
from mmsae.evaluation.pooling import Sums, Through
from mmsae.evaluation.rows import row
from mmsae.metrics.components import Components
from mmsae.metrics.host.ood import OODMetrics, auroc_interval, ood_metrics
from mmsae.sae import SAE, random_control
from mmsae.types import IMAGE, Codes, InputError

ID = "id"


def pca_control(train: Features, k: int) -> Callable[[Features], Features]:
    """Features in which the SAE is replaced by the k leading principal components of the training features."""
    components = Components.leading(train.x, min(k, train.x.shape[1] - 1))

    def change(f: Features) -> Features:
        z = components.project(f.x)
        recon = components.restore(z)
        codes = Codes(z.float(), None, z.shape[1], f.z.modality)
        return f.through(Through(codes, recon, Sums.of(f.x, recon, codes, torch.arange(f.n), f.n)))

    return change


class DetectorScores(NamedTuple):
    """What the head returns."""

    rows: list[dict[str, Any]]  #: Uniform rows; ``value`` is the AUROC, beside it the other figures of ``OODMetrics``
    #: ``{(control, score, features): {set: (n,) confidences}}``; the set ``id`` is the ID test set.
    conf: dict[tuple[str, str, str], dict[str, Tensor]]
    chosen: dict[str, dict[str, float]]  #: ``{control: {"score/kind": setting}}``
    notes: list[str]  #: What a reader must know
    edges: list[str]  #: Settings that are an end of their grid (:mod:`mmsae.metrics.choice`)


def check_names(detection: Detection) -> None:
    """Refuse features, detectors and controls that do not exist.

    Raises:
        InputError: With the first of them.
    """
    for name in ("features", "scores", "controls"):
        known = getattr(Detection, name)
        if odd := [g for g in getattr(detection, name) if g not in known]:
            raise InputError(f"--{name} has {odd[0]!r}, there are {', '.join(known)}")


def ood_head(
    fit: FitImages,
    test: Features,
    ood: Mapping[str, Features],
    detection: Detection = Detection(),
    *,
    sae: SAE | None = None,
    near: Sequence[str] = (),
    random: Callable[[str, Features], Features] | None = None,
    heads: Mapping[str, Mapping[str, d.Head]] = {},
    modality: str = IMAGE,
    seed: int = 0,
    say: Callable[[str], None] = lambda said: None,
) -> DetectorScores:
    """Score all detectors and controls on all sets.

    The ``random`` control is ``sae`` with fresh weights, or ``random(set name, features)`` where it cannot be computed
    from ``x``; ``heads`` are its and other controls' classifiers where ``fit.heads`` are no linear probes either. OOD
    sets that are not ``near`` are far. ``say`` is told what is fitted next.
    """
    kinds, scores, controls = detection.features, detection.scores, detection.controls
    sets = {ID: test, **ood}
    out = DetectorScores([], {}, {}, [], [])
    say(f"{len(scores)} detectors on {', '.join(kinds)}, fitted on {fit.train.n:,} images")
    _score(out, "", fit_detectors(fit, kinds, scores), sets)
    coded = [k for k in kinds if k in ("code", "recon", "resid")]
    if RANDOM in controls and sae is not None:
        say("the same through random weights")
        fresh = random_control(sae, seed, None if random else {modality: fit.train.x})
        change = random or (lambda _, f: with_sae(f, fresh, modality))
        named = iter(("train", "val", "val_ood"))
        again = fit.same_sae(lambda f: change(next(named), f))._replace(heads=heads.get(RANDOM, {}))
        changed = {name: change(name, f) for name, f in sets.items()}
        _score(out, RANDOM, fit_detectors(again, coded, scores), changed)
    if PCA in controls:
        k = round(fit.train.l0)
        say(f"the same through {k} principal components")
        change = pca_control(fit.train, k)
        again = fit.same_sae(change)._replace(heads=heads.get(PCA, {}))
        own = [s for s in scores if s not in NATIVE or s == "recon"]
        changed = {name: change(f) for name, f in sets.items()}
        _score(out, PCA, fit_detectors(again, coded, own), changed)
        out.notes.append(f"control pca: {changed[ID].z.d_sae} components, the mean number of latents on per row")
    if STATISTICS in controls and all(f.stats is not None for f in (fit.train, *sets.values())):
        detector = d.MDS(d.Gaussians.fit(fit.train.stats))
        _score(out, STATISTICS, Fitted({("mds", "pixels"): lambda f: detector(f.stats)}, {}, {}, []), sets)
    out.rows.extend(group_means(out.rows, list(ood), near))
    return out


def _score(out: DetectorScores, control: str, fitted: Fitted, sets: Mapping[str, Features]) -> None:
    """Confidences and rows of all detectors on all sets."""
    prefix = f"control {control}: " if control else ""
    out.notes.extend(prefix + note for note in dict.fromkeys(fitted.notes))
    out.edges.extend(prefix + edge for edge in fitted.edges)
    out.chosen[control] = fitted.chosen
    known = sets[ID].labels >= 0
    for kind, classifier in fitted.classifiers.items():
        hit = (classifier(sets[ID]).argmax(1) == sets[ID].labels)[known].double()
        out.rows.append(row("ood", ID, "id_accuracy", kind, hit.mean().item(), len(hit), control))
    for (score, kind), detector in fitted.detectors.items():
        conf = {name: detector(f) for name, f in sets.items()}
        out.conf[control, score, kind] = conf
        for name, values in conf.items():
            if name == ID:
                continue
            m = ood_metrics(conf[ID], values)
            ends = auroc_interval(conf[ID], values)
            out.rows.append(row("ood", name, score, kind, m.auroc, m.n_id + m.n_ood, control, ends, **m._asdict()))


def group_means(rows: Sequence[Mapping[str, Any]], names: Sequence[str], near: Sequence[str]) -> list[dict[str, Any]]:
    """Unweighted means over the near sets and over the far ones, as rows of the sets ``near`` and ``far``."""
    figures = OODMetrics._fields[:5]
    out = []
    for group, members in (("near", set(near) & set(names)), ("far", set(names) - set(near))):
        by: dict[tuple, list] = {}
        for r in rows:
            if r["set"] in members:
                by.setdefault((r["control"], r["score"], r["features"]), []).append(r)
        for (control, score, kind), some in by.items():
            mean = {k: sum(r[k] for r in some) / len(some) for k in figures}
            n = sum(r["n_ood"] for r in some)
            out.append(row("ood", group, score, kind, mean["auroc"], some[0]["n_id"] + n, control, sets=len(some),
                           **mean, n_id=some[0]["n_id"], n_ood=n))  # fmt: skip
    return out

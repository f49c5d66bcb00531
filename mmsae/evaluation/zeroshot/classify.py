"""Images of shards scored against class texts, through several SAEs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import Features, ImageChoice, load_features, token_site, with_sae
from mmsae.evaluation.labels import Classes, Labels
from mmsae.evaluation.options import EvaluationRun, Labelled
from mmsae.evaluation.zeroshot.head import LabelledScores, at_embedding
from mmsae.evaluation.zeroshot.scores import zero_shot_scores
from mmsae.hosts import Host
from mmsae.metrics.pairs.retrieval import cosine_to
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, InputError


class Classifier(NamedTuple):
    """A host that classifies images by texts."""

    host: Host  #: The host
    classes: Classes  #: Names and label values
    vectors: Tensor  #: ``(C, d)`` their embeddings
    images: Labelled = Labelled()  #: Labels and limit
    run: EvaluationRun = EvaluationRun()  #: How to compute

    def load(
        self, sae: SAE, shards: Any, uids: set[str] | None, desc: str, embed: bool, others: Mapping[str, SAE] = {}
    ) -> Features:
        """Features of the images of some uids (None: of all)."""
        keep = None if uids is None else uids.__contains__
        choice = ImageChoice(self.images.label, classes=self.classes.values, limit=self.images.limit, keep=keep)
        return load_features(self.host, sae, shards, choice, self.run, embed=embed, others=others, desc=desc)

    def through(self, sae: SAE, shards: Any, uids: set[str] | None, desc: str) -> Tensor:
        """``(n, e)`` embeddings of a host that goes on from the SAE's reconstruction."""
        fresh = self._replace(run=replace(self.run, cache=""))
        with self.host.edit(sae.sites[IMAGE], lambda rows: sae.decode(sae.encode(rows, IMAGE), IMAGE)):
            return fresh.load(sae, shards, uids, desc, True).embed

    def scores(
        self, saes: dict[str, SAE], shards: Any, uids: set[str], desc: str
    ) -> tuple[dict[str, LabelledScores], dict[str, float]]:
        """Scores and explained variance of the images of every SAE.

        They are from one pass at the embeddings, else with the host run on from the SAE's reconstruction.
        """
        model = saes[""]
        joint = at_embedding(model)
        others = {k: s for k, s in saes.items() if k} if token_site(model.sites[IMAGE]) else {}
        f = self.load(model, shards, uids, desc, not joint, others)
        out, explained = {}, {}
        for name, sae in saes.items():
            x = f.x if joint else f.embed
            view = f
            if name:
                view = f.through(f.others[name]) if name in f.others else with_sae(f, sae)
            if joint and TEXT in sae.modalities:
                scores = zero_shot_scores(sae, x.to(self.host.device), self.vectors)
            else:
                seen = view.recon if joint else self.through(sae, shards, uids, f"{desc}, {name or 'reconstructed'}")
                scores = {"raw": cosine_to(self.vectors)(x), "recon": cosine_to(self.vectors)(seen)}
            out[name] = LabelledScores({k: s.cpu() for k, s in scores.items()}, f.labels)
            explained[name] = 1 - view.fvu
        return out, explained


def refuse_unknown(known: Labels, named: Classes) -> None:
    """Refuse labels that no class has: they could only count as errors."""
    values = set(named.values)
    if odd := [v for v in known.value.values() if v is not None and v not in values]:
        said = ", ".join(map(known.name_of, list(dict.fromkeys(odd))[:3]))
        raise InputError(
            f"{len(odd)} of the {len(known.value)} images have a label that none of the {len(values)} classes has, "
            f"such as {said}"
        )


def class_warnings(named: Classes, labels: Tensor, source: str = "") -> list[str]:
    """What to say about classes without images: they compete, but are not in the mean per class."""
    count = torch.bincount(labels, minlength=len(named.names))
    empty = [n for n, c in zip(named.names, count.tolist(), strict=True) if not c]
    out = []
    if empty:
        out.append(f"{len(empty)} of the {len(named.names)} classes of {source or 'the data'} have no test image: "
                   f"{', '.join(empty[:10])}; the mean per class leaves them out")  # fmt: skip
    if int((count > 0).sum()) == 1:
        out.append(f"all {len(labels)} test images are of one class: accuracies say little")
    return out

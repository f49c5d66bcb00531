"""Zero-shot classification as a head: raw, reconstruction, code and concept-enhanced scores, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.options import ALPHAS
from mmsae.evaluation.rows import row
from mmsae.evaluation.zeroshot.scores import class_embeddings, enhance, hits, tune_alpha, zero_shot_scores
from mmsae.hosts import Encoder, Host
from mmsae.metrics.choice import at_edge
from mmsae.metrics.statistics import balanced_interval, wilson
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, InputError

CONCEPTS = ("code", "recon")
SCORES = ("top1", "top5", "balanced")


class LabelledScores(NamedTuple):
    """Scores of some labelled images."""

    scores: Mapping[str, Tensor]  #: ``{features: (N, C)}`` with ``raw`` and whatever of ``recon``, ``code`` there is
    labels: Tensor  #: ``(N,)`` int64 classes


class Accuracies(NamedTuple):
    """What the head returns."""

    #: Uniform rows: ``top1``, ``top5`` and ``balanced`` of every kind of features, with 95% intervals.
    rows: list[dict[str, Any]]
    alpha: float | None  #: Weight of the concepts in ``enhanced``; None without concepts
    tuning: dict[float, float]  #: ``{alpha: top-1 on the tuning split}``
    per_class: dict[str, Tensor]  #: ``{features: (C,) top-1 within the class, NaN without images}``
    counts: Tensor  #: ``(C,)`` images per class
    edges: list[str]  #: Says so where alpha is the end of its grid (:mod:`mmsae.metrics.choice`)


def zero_shot_head(
    test: LabelledScores,
    tune: LabelledScores,
    *,
    concept: str = "code",
    alphas: Sequence[float] = ALPHAS,
    name: str = "test",
    control: str = "",
    seed: int = 0,
) -> Accuracies:
    """Accuracies on ``test``, with alpha chosen on ``tune`` alone.

    Without scores of ``concept`` there is no ``enhanced``; alpha 0, which is plain CLIP to the bit, is always tried.
    ``name`` and ``control`` are those of the rows, ``seed`` that of the bootstrap of ``balanced``.

    Raises:
        InputError: An unknown concept, no images, or a label that no class has.
    """
    if concept not in CONCEPTS:
        raise InputError(f"concept is {concept!r}, it must be one of {', '.join(CONCEPTS)}")
    n_classes = test.scores["raw"].shape[1]
    for split, said in ((test, name), (tune, "tuning")):
        if not len(split.labels):
            raise InputError(f"the {said} split has 0 images with a label")
        if int(split.labels.min()) < 0 or int(split.labels.max()) >= n_classes:
            bad = int(((split.labels < 0) | (split.labels >= n_classes)).sum())
            raise InputError(f"{bad} of {len(split.labels)} {said} images have none of the {n_classes} classes")
    scores, alpha, tuning = dict(test.scores), None, {}
    if concept in scores:
        alpha, tuning = tune_alpha(dict(tune.scores), tune.labels, concept, alphas)
        scores["enhanced"] = enhance(scores["raw"], scores[concept], alpha)
    counts = torch.bincount(test.labels, minlength=n_classes)
    rows, per_class = [], {}
    for kind, s in scores.items():
        right = {"top1": hits(s, test.labels), "top5": hits(s, test.labels, 5)}
        for score, hit in right.items():
            ends = wilson(int(hit.sum()), len(hit))
            rows.append(row("zeroshot", name, score, kind, hit.double().mean(), len(hit), control, ends))
        own = torch.bincount(test.labels, right["top1"].double(), n_classes)
        per_class[kind] = own / counts
        value, seen = per_class[kind].nanmean(), int((counts > 0).sum())
        ends = balanced_interval(own, counts, seed)
        rows.append(row("zeroshot", name, "balanced", kind, value, len(test.labels), control, ends, classes=seen))
    edges = at_edge(f"alpha{f' of control {control}' if control else ''}", alpha, tuning, (0.0,)) if tuning else []
    return Accuracies(rows, alpha, tuning, per_class, counts, edges)


def zero_shot(
    sae: SAE,
    x: Tensor,
    labels: Tensor,
    classes: Tensor,
    tune: tuple[Tensor, Tensor],
    *,
    concept: str = "code",
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """The figures of :func:`zero_shot_head` alone, of an SAE at the embeddings that images and texts share.

    ``x (N, d)`` are raw image embeddings, ``classes (C, d)`` come from
    :func:`mmsae.evaluation.zeroshot.scores.class_embeddings`. Alpha is chosen on ``tune``, ``(x, labels)`` of other
    images, alone.

    Returns:
        Top-1 accuracies ``raw``, ``recon``, ``code`` and ``enhanced`` with its ``alpha``; ``top5`` and ``balanced``
        with the same four keys; ``tuning``: ``{alpha: top-1 on the tuning split}``; ``classes`` and ``images``.

    Raises:
        InputError: As :func:`zero_shot_head` does.
    """
    test, held = (
        LabelledScores({kind: s.cpu() for kind, s in zero_shot_scores(sae, rows, classes).items()}, own.cpu())
        for rows, own in ((x, labels), tune)
    )
    found = zero_shot_head(test, held, concept=concept, alphas=alphas)
    of = {score: {r["features"]: r["value"] for r in found.rows if r["score"] == score} for score in SCORES}
    return {
        **of.pop("top1"), "alpha": found.alpha, "concept": concept, **of, "tuning": found.tuning,
        "classes": len(classes), "images": len(labels),
    }  # fmt: skip


def text_classes(host: Host, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """``(C, d)`` class embeddings of a host, on the CPU; see :func:`mmsae.evaluation.zeroshot.scores.class_embeddings`.

    Raises:
        InputError: The host has no text encoder.
    """
    if not isinstance(host, Encoder) or TEXT not in host.modalities:
        raise InputError(f"host {host.hint} has no text encoder, so class names say nothing to it")
    return class_embeddings(lambda texts: host.encode_text(host.tokenize(texts)), names, templates).cpu()


def at_embedding(sae: SAE, modality: str = IMAGE) -> bool:
    """Whether the SAE reads the embeddings that images and texts share."""
    return sae.sites[modality].module == f"{modality}.embed"

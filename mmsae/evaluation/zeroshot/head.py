"""Zero-shot classification as a head: raw, reconstruction, code and concept-enhanced scores, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.ood.detectors import Head, cosine_head
from mmsae.evaluation.rows import row
from mmsae.evaluation.zeroshot.scores import ALPHAS, CONCEPTS, class_embeddings, enhance, hits, tune_alpha
from mmsae.hosts import Encoder, Host
from mmsae.metrics.choice import at_edge
from mmsae.metrics.statistics import balanced_interval, wilson
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, InputError

SCORES = ("top1", "top5", "balanced")


class Split(NamedTuple):
    """Scores of some labelled images.

    Attributes:
        scores: ``{features: (N, C)}`` with ``raw`` and whatever of ``recon``, ``code`` there is.
        labels: ``(N,)`` int64 classes.
    """

    scores: Mapping[str, Tensor]
    labels: Tensor


class ZeroShot(NamedTuple):
    """What the head returns.

    Attributes:
        rows: Uniform rows: ``top1``, ``top5`` and ``balanced`` of every kind of features, with 95% intervals.
        alpha: Weight of the concepts in ``enhanced``; None without concepts.
        tuning: ``{alpha: top-1 on the tuning split}``.
        per_class: ``{features: (C,) top-1 within the class, NaN without images}``.
        counts: ``(C,)`` images per class.
        edges: Says so where alpha is the end of its grid (:mod:`mmsae.metrics.choice`).
    """

    rows: list[dict[str, Any]]
    alpha: float | None
    tuning: dict[float, float]
    per_class: dict[str, Tensor]
    counts: Tensor
    edges: list[str]


def zero_shot_head(
    test: Split,
    tune: Split,
    *,
    concept: str = "code",
    alphas: Sequence[float] = ALPHAS,
    name: str = "test",
    control: str = "",
    seed: int = 0,
) -> ZeroShot:
    """Accuracies of scores that are there already.

    Args:
        test: Images to report on.
        tune: Other images, on which alone alpha is chosen.
        concept: What enhances the raw scores: ``code`` or ``recon``; without such scores there is no ``enhanced``.
        alphas: Grid; 0, which is plain CLIP to the bit, is always tried.
        name: Of the test set, for the rows.
        control: Of the rows.
        seed: Of the bootstrap of ``balanced``.

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
            low, high = wilson(int(hit.sum()), len(hit))
            value = hit.double().mean().item()
            rows.append(row("zeroshot", name, score, kind, value, len(hit), control, low=low, high=high))
        own = torch.bincount(test.labels, right["top1"].double(), n_classes)
        per_class[kind] = own / counts
        low, high = balanced_interval(own, counts, seed)
        rows.append(row("zeroshot", name, "balanced", kind, per_class[kind].nanmean().item(), len(test.labels), control,
                        low=low, high=high, classes=int((counts > 0).sum())))  # fmt: skip
    edges = at_edge(f"alpha{f' of control {control}' if control else ''}", alpha, tuning, (0.0,)) if tuning else []
    return ZeroShot(rows, alpha, tuning, per_class, counts, edges)


WHOSE = ("auto", "host", "zeroshot", "probe")


def whose_logits(asked: str, host: Host, names: bool) -> str:
    """Whose logits detectors read: ``host``, ``zeroshot`` or ``probe``.

    Args:
        asked: Of :data:`WHOSE`; ``auto`` is the host's own classifier where it has one, else ``zeroshot`` where class
            names are given, else ``probe``.
        host: The host.
        names: Whether class names are given.

    Raises:
        InputError: Unknown, or not to be had.
    """
    if asked not in WHOSE:
        raise InputError(f"logits is {asked!r}, it can be {', '.join(WHOSE)}")
    if asked == "auto":
        return "host" if classifier(host) is not None else "zeroshot" if names else "probe"
    if asked == "host" and classifier(host) is None:
        raise InputError(f"logits is host, but host {host.hint} has no linear classifier of its own: zeroshot or probe")
    if asked == "zeroshot" and not names:
        raise InputError("logits is zeroshot, which needs the names of labelled classes: give --classes and --label")
    return asked


def classifier(host: Host) -> tuple[Tensor, Tensor] | None:
    """Weights and bias of the host's own linear classifier of embeddings, or None."""
    return host.classifier if isinstance(host, Encoder) else None


def at_classifier(sae: SAE, host: Host) -> bool:
    """Whether the SAE reads what the host's own classifier reads."""
    own = classifier(host)
    return own is not None and IMAGE in sae.sites and sae.sites[IMAGE].module in ("image.embed", "image.pooled")


def host_heads(sae: SAE, host: Host) -> tuple[dict[str, Head], dict[str, dict[str, Head]]]:
    """``{kind: the host's own classifier}``, of the SAE and of every control.

    Of ``raw`` and ``recon`` where the SAE is read what the classifier reads, else of ``embed`` alone.
    """
    weight, bias = classifier(host)
    head = Head(weight.double(), bias.double(), known=False)
    if not at_classifier(sae, host):
        return {"embed": head}, {}
    return {"raw": head, "recon": head}, {control: {"recon": head} for control in ("random", "pca")}


def logits_of(kinds: Sequence[str], heads: Mapping[str, Head], n_classes: int) -> dict[str, str]:
    """``{kind: whose logits were read}``: a classifier that was given, else a probe where there are two classes."""
    given = {k: heads[k] for k in kinds if k in heads}
    said = {k: "zero-shot" if h.known else f"the host's own, {len(h.bias):,} classes" for k, h in given.items()}
    return (dict.fromkeys(kinds, "linear probe") if n_classes > 1 else {}) | said


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


@torch.no_grad()
def zero_shot_heads(sae: SAE, classes: Tensor, scale: float | None) -> dict[str, Head]:
    """``{kind: classifier}`` by cosine with class embeddings ``(C, d)``, for every kind that has one.

    At the embeddings: ``raw``, ``recon`` (both sides reconstructed where the SAE reads texts) and ``code``. Elsewhere
    only ``embed``, the host's own embeddings.

    Args:
        sae: The SAE.
        classes: From :func:`text_classes`.
        scale: The host's logit scale; None: 100.
    """
    scale = 100.0 if scale is None else scale
    if not at_embedding(sae):
        return {"embed": cosine_head(classes, scale)}
    heads = {"raw": cosine_head(classes, scale), "recon": cosine_head(classes, scale)}
    if TEXT in sae.modalities:
        h = sae.encode(classes, TEXT)
        heads["recon"] = cosine_head(sae.decode(h, TEXT).cpu(), scale)
        heads["code"] = cosine_head(h.to_dense().cpu(), scale)
    return heads

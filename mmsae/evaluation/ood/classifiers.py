"""Whose logits OOD detectors read: the host's own classifier, one by class names, or a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmsae.evaluation.ood.detectors import Head, cosine_head
from mmsae.evaluation.options import EMBED, PCA, RANDOM
from mmsae.evaluation.zeroshot.head import at_embedding
from mmsae.hosts import Encoder, Host
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, InputError

WHOSE = ("auto", "host", "zeroshot", "probe")


def check_logits(asked: str, names: bool) -> None:
    """Refuse what no host can give, before there is one; ``names`` says whether names of labelled classes are given.

    Raises:
        InputError: Unknown, or ``zeroshot`` without names.
    """
    if asked not in WHOSE:
        raise InputError(f"logits is {asked!r}, it can be {', '.join(WHOSE)}")
    if asked == "zeroshot" and not names:
        raise InputError("logits is zeroshot, which needs the names of labelled classes: give --classes and --label")


def whose_logits(asked: str, host: Host, names: bool) -> str:
    """Whose logits detectors read: ``host``, ``zeroshot`` or ``probe``.

    ``auto`` is the host's own classifier where it has one, else ``zeroshot`` where class names are given, else
    ``probe``.

    Raises:
        InputError: Unknown, or not to be had.
    """
    check_logits(asked, names)
    if asked == "auto":
        return "host" if classifier(host) is not None else "zeroshot" if names else "probe"
    if asked == "host" and classifier(host) is None:
        raise InputError(f"logits is host, but host {host.hint} has no linear classifier of its own: zeroshot or probe")
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

    It reads ``raw`` and ``recon`` where the SAE is read what the classifier reads, else ``embed`` alone.
    """
    weight, bias = classifier(host)
    head = Head(weight.double(), bias.double(), known=False)
    if not at_classifier(sae, host):
        return {EMBED: head}, {}
    return {"raw": head, "recon": head}, {control: {"recon": head} for control in (RANDOM, PCA)}


def logits_of(kinds: Sequence[str], heads: Mapping[str, Head], n_classes: int) -> dict[str, str]:
    """``{kind: whose logits were read}``: a classifier that was given, else a probe where there are two classes."""
    given = {k: heads[k] for k in kinds if k in heads}
    said = {k: "zero-shot" if h.known else f"the host's own, {len(h.bias):,} classes" for k, h in given.items()}
    return (dict.fromkeys(kinds, "linear probe") if n_classes > 1 else {}) | said


@torch.no_grad()
def zero_shot_heads(sae: SAE, classes: Tensor, scale: float | None) -> dict[str, Head]:
    """``{kind: classifier}`` by cosine with class embeddings ``(C, d)``, for every kind that has one.

    At the embeddings: ``raw``, ``recon`` (both sides reconstructed where the SAE reads texts) and ``code``. Elsewhere
    only ``embed``, the host's own embeddings. A host without a logit scale has 100.
    """
    scale = 100.0 if scale is None else scale
    if not at_embedding(sae):
        return {EMBED: cosine_head(classes, scale)}
    heads = {"raw": cosine_head(classes, scale), "recon": cosine_head(classes, scale)}
    if TEXT in sae.modalities:
        h = sae.encode(classes, TEXT)
        heads["recon"] = cosine_head(sae.decode(h, TEXT).cpu(), scale)
        heads["code"] = cosine_head(h.to_dense().cpu(), scale)
    return heads


def classifiers(
    whose: str, sae: SAE, host: Host, fresh: SAE, classes: Callable[[], Tensor]
) -> tuple[dict[str, Head], dict[str, dict[str, Head]]]:
    """Classifiers in the place of linear probes: of the SAE's features, and of those of each control.

    ``fresh`` is the SAE with random weights; ``classes`` gives ``(C, d)`` class embeddings, for ``zeroshot``.
    """
    if whose == "host":
        return host_heads(sae, host)
    if whose != "zeroshot":
        return {}, {}
    vectors = classes()
    own, random = (zero_shot_heads(s, vectors, host.logit_scale) for s in (sae, fresh))
    return own, {RANDOM: random}

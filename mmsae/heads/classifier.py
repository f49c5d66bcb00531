"""Classifiers that a host brings along, its own or by class names, in the spaces in which an SAE's features lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmsae.backbones import Backbone
from mmsae.heads.detectors import Head, cosine_head
from mmsae.sae import SAE
from mmsae.tasks.zero_shot import class_embeddings
from mmsae.types import IMAGE, TEXT, InputError

WHOSE = ("auto", "host", "zeroshot", "probe")


def whose_logits(asked: str, host: Backbone, names: bool) -> str:
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
        return "host" if host.classifier is not None else "zeroshot" if names else "probe"
    if asked == "host" and host.classifier is None:
        raise InputError(f"logits is host, but host {host.hint} has no linear classifier of its own: zeroshot or probe")
    if asked == "zeroshot" and not names:
        raise InputError("logits is zeroshot, which needs the names of labelled classes: give --classes and --label")
    return asked


def at_classifier(sae: SAE, host: Backbone) -> bool:
    """Whether the SAE reads what the host's own classifier reads."""
    own = host.classifier
    return own is not None and IMAGE in sae.sites and sae.sites[IMAGE].module in ("image.embed", "image.pooled")


def host_heads(sae: SAE, host: Backbone) -> tuple[dict[str, Head], dict[str, dict[str, Head]]]:
    """``{kind: the host's own classifier}``, of the SAE and of every control.

    Of ``raw`` and ``recon`` where the SAE is read what the classifier reads, else of ``embed`` alone.
    """
    weight, bias = host.classifier
    head = Head(weight.double(), bias.double(), known=False)
    if not at_classifier(sae, host):
        return {"embed": head}, {}
    return {"raw": head, "recon": head}, {control: {"recon": head} for control in ("random", "pca")}


def logits_of(kinds: Sequence[str], heads: Mapping[str, Head], n_classes: int) -> dict[str, str]:
    """``{kind: whose logits were read}``: a classifier that was given, else a probe where there are two classes."""
    given = {k: heads[k] for k in kinds if k in heads}
    said = {k: "zero-shot" if h.known else f"the host's own, {len(h.bias):,} classes" for k, h in given.items()}
    return (dict.fromkeys(kinds, "linear probe") if n_classes > 1 else {}) | said


def text_classes(host: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """``(C, d)`` class embeddings of a host, on the CPU; see :func:`mmsae.tasks.zero_shot.class_embeddings`.

    Raises:
        InputError: The host has no text encoder.
    """
    if TEXT not in host.modalities or host.tokenize is None:
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

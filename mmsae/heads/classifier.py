"""Zero-shot classifiers of a host in the spaces in which an SAE's features lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmsae.backbones import Backbone
from mmsae.heads.detectors import Head, cosine_head
from mmsae.sae import SAE
from mmsae.tasks.zero_shot import class_embeddings
from mmsae.types import IMAGE, TEXT, InputError


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

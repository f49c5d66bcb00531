"""VS2: zero-shot classification by CLIP with the sample's own features amplified (arXiv 2506.01247).

``x' = x + J((gamma - 1) z)`` for the features z that are active on a sample, skipped where the SAE reconstructs the
sample badly: only the abstract was available, so the guard's form (share of variance unexplained below q) is ours.
It is no new machinery: an edit that scales every active feature, a guard, and the write-back ``delta``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.hosts.base import Host
from mmsae.sae import SAE
from mmsae.steering.edits.attach import attach
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.edits.log import Log
from mmsae.types import Site


def vs2(gamma: float = 1.5, guard: float | None = 0.5, **more: Any) -> Intervention:
    """The intervention of VS2.

    Args:
        gamma: Factor of every active feature; 1 changes nothing. Choose it on other data than the result is for.
        guard: Act only on samples with less than this share of variance unexplained; None: on all.
        more: Other fields of :class:`~mmsae.steering.edits.intervention.Intervention`, e.g. ``tokens``.
    """
    return Intervention(Edit.scale(None, gamma), unit="raw", guard=guard, **more)


class SteeredZeroShot(NamedTuple):
    """Zero-shot classification with and without steering."""

    clean: Tensor  #: ``(N,)`` predicted classes of the host alone.
    steered: Tensor  #: ``(N,)`` with the intervention.
    share: float  #: Share of rows on which the intervention acted.
    relative: float  #: Mean ``|dx| / |x|`` of these rows.

    def accuracy(self, labels: Tensor) -> tuple[float, float]:
        """Accuracy without and with steering."""
        return tuple(float((p == labels.to(p.device)).double().mean()) for p in (self.clean, self.steered))


@torch.no_grad()
def zero_shot_steered(
    host: Host,
    images: Iterable[Tensor],
    classes: Tensor,
    sae: SAE,
    intervention: Intervention,
    site: Site | str = "image.embed",
    allow_other_site: bool = False,
) -> SteeredZeroShot:
    """Classify images by cosine with class embeddings, each with and without an intervention at an image site.

    Args:
        host: Host with images and texts in one space.
        images: Batches ``(B, 3, H, W)`` of the host's transform.
        classes: ``(C, d)`` embeddings, e.g. :func:`mmsae.evaluation.zeroshot.scores.class_embeddings`.
        sae: SAE of the site.
        intervention: E.g. :func:`vs2`.
        site: An endpoint (``image.embed``, ``image.pooled``) or any module of the image tower.
        allow_other_site: See :func:`~mmsae.steering.edits.attach.attach`.
    """
    classes = F.normalize(classes.float(), dim=1).to(host.device)
    clean, steered, logs = [], [], []
    for batch in images:
        clean.append(_predict(host, batch, classes))
        with attach(host, {site: (sae, intervention)}, allow_other_site) as log:
            steered.append(_predict(host, batch, classes))
        logs += log.sites
    log = Log(logs)
    return SteeredZeroShot(torch.cat(clean), torch.cat(steered), log.share, log.relative)


def _predict(host: Host, batch: Tensor, classes: Tensor) -> Tensor:
    return (F.normalize(host.encode_image(batch), dim=1) @ classes.t()).argmax(1)

"""Losses of a host whose derivatives by its activations are read beside these (g-SAE, arXiv 2411.10397)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor

from mmsae.types import IMAGE, ImageTextBatch


class HostLoss(NamedTuple):
    """A loss of a host."""

    name: str  #: What it is called.
    #: ``(host, batch) -> (n,)`` differentiable terms. Their sum is differentiated, never their mean: where items do not
    #: meet in a term, an item's gradient does not depend on the batch that it is in.
    terms: Callable[[Any, ImageTextBatch], Tensor]
    modalities: tuple[str, ...] = ()  #: What a batch must hold, whichever sites are read.
    labels: bool = False  #: Whether a batch must hold class numbers.
    #: What makes the loss's images, PIL image to ``(3, H, W)``, on hosts that read none themselves.
    transform: Callable[[Any], Tensor] | None = None


Gradient = str | HostLoss


def reading(host: Any, modalities: Collection[str], text: str = "question", gradient: Gradient = "") -> dict[str, Any]:
    """``host.reading`` for a loader whose batches hold what the gradient of a loss takes, too."""
    if not gradient:
        return host.reading(modalities, text)
    loss = host.objective(gradient)
    takes = {*modalities, *loss.modalities}
    if loss.transform is None:
        made = host.reading(takes, text)
    else:
        made = host.reading(takes - {IMAGE}, text) | {"transform": loss.transform}
    if not loss.labels:
        return made
    has = [n for n, key in (("image", "transform"), ("caption", "tokenize")) if made[key] is not None]
    return made | {"need": [*has, "cls"]}


def plain(batch: ImageTextBatch) -> ImageTextBatch:
    """The batch with tensors that autograd may keep, as those made in inference mode are not."""

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: own(v) for k, v in value.items()}
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    return ImageTextBatch(*map(own, batch))

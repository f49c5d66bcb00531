"""Numbers of images: what a metric of a sweep is made of.

A *scorer* is any ``scorer(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``: a classifier's hit, the answer of a
visual-question model, a colour probe. Success should be scored by another model than the one that chose the feature. A
*metric* compares a steered image with its unsteered twin: ``metric(before, after, prompts) -> (B,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmsae.hosts import Host, as_encoder
from mmsae.steering.measure.images import directional, locality

Scorer = Callable[[Tensor, Sequence[str]], Tensor]
Metric = Callable[[Tensor, Tensor, Sequence[str]], Tensor]


class Judge(Protocol):
    """Embeds images and texts in one space, unit norm."""

    def images(self, x: Tensor) -> Tensor:
        """``(B, d)`` of images ``(B, 3, H, W)`` in [0, 1]."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """``(n, d)`` of texts."""


class CLIPJudge:
    """An open_clip host as a judge; ``batch_size`` images or texts at a time."""

    def __init__(self, host: Host, batch_size: int = 64):
        self.host, self.batch_size = as_encoder(host, "a judge"), batch_size
        self._transform = host.transform()
        self._texts: dict[str, Tensor] = {}
        self._seen: list[tuple[Tensor, Tensor]] = []

    def images(self, x: Tensor) -> Tensor:
        """``(B, d)`` unit embeddings of images ``(B, 3, H, W)`` in [0, 1], by the host's own transform.

        The latest few tensors are remembered: every metric of a sweep asks for the same two.
        """
        from torchvision.transforms.functional import to_pil_image

        if found := [e for seen, e in self._seen if seen is x]:
            return found[0]
        parts = []
        for some in x.detach().cpu().clamp(0, 1).split(self.batch_size):
            batch = torch.stack([self._transform(to_pil_image(image)) for image in some])
            parts.append(self.host.encode_image(batch))
        out = F.normalize(torch.cat(parts), dim=1)
        self._seen = [*self._seen[-3:], (x, out)]
        return out

    def texts(self, texts: Sequence[str]) -> Tensor:
        """``(n, d)`` unit embeddings; each text is embedded once."""
        new = [t for t in dict.fromkeys(texts) if t not in self._texts]
        if new:
            some = [new[i : i + self.batch_size] for i in range(0, len(new), self.batch_size)]
            found = F.normalize(torch.cat([self.host.encode_text(self.host.tokenize(s)) for s in some]), dim=1)
            self._texts |= dict(zip(new, found, strict=True))
        return torch.stack([self._texts[t] for t in texts])


def after(scorer: Scorer) -> Metric:
    """The score of the steered image."""
    return lambda before, steered, prompts: scorer(steered, prompts)


def change(scorer: Scorer) -> Metric:
    """The score of the steered image minus that of its twin."""
    return lambda before, steered, prompts: scorer(steered, prompts).double() - scorer(before, prompts).double()


def similarity(judge: Judge, text: str) -> Scorer:
    """``cos(E(I), E(text))``; its :func:`change` is the CLIP gain of a steered image."""
    return lambda images, prompts: judge.images(images) @ judge.texts([text])[0]


def towards(
    judge: Judge, target: Callable[[str], str] | str, source: Callable[[str], str] | str | None = None
) -> Metric:
    """Directional CLIP similarity: from the prompt (or ``source``, what the unsteered image shows) to ``target``.

    Both are texts, or functions from the prompt to one.
    """

    def texts(which: Callable[[str], str] | str | None, prompts: Sequence[str]) -> Tensor:
        return judge.texts([p if which is None else which if isinstance(which, str) else which(p) for p in prompts])

    return lambda before, steered, prompts: directional(
        judge.images(before), judge.images(steered), texts(source, prompts), texts(target, prompts)
    )


def kept(judge: Judge) -> Metric:
    """``cos(E(I'), E(I))``: how much of the content stayed."""
    return lambda before, steered, prompts: (judge.images(before) * judge.images(steered)).sum(1)


def inside(mask: Tensor) -> Metric:
    """Share of the change per pixel that lies inside a mask ``(h, w)``; .5 for a change that knows no mask."""
    return lambda before, steered, prompts: locality(before, steered, mask).share


def moved(before: Tensor, steered: Tensor, prompts: Sequence[str]) -> Tensor:
    """Root mean squared change of pixel values."""
    return (steered - before).square().flatten(1).mean(1).sqrt()

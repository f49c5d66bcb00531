"""Images on their way to an encoder: what is left of the host's own transform for the device that the host is on.

A transform ends in arithmetic: 8-bit pixels become floats and are normalised. Without that end, workers do half of the
work and send a quarter of the bytes, and the host's device does the rest with the same bits (:func:`split`). Resizing
can be left to the device as well, on request, for its bits are others (:class:`Resizer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, Resize, ToTensor

from mmsae.types import InputError

MOST_LEVELS, LEAST_COSINE = 8.0, 0.99
"""How far pixels, in levels of 255, and embeddings may be from those of the host's own transform."""

TO_RGB = ("_convert_to_rgb", "MaybeConvertMode")
"""Steps of open_clip's transforms that have nothing to do: decoded images are RGB."""


class Head:
    """The beginning of a transform: PIL image to ``(3, H, W)`` uint8.

    Args:
        steps: What is done with the image.
        whole: The transform that they are of.
        ragged: Whether images keep sizes of their own, so that a batch is one row of pixels; they are then
            ``(H, W, 3)``, as they lie in memory (:class:`mmsae.shards.batches.Reader`).
    """

    def __init__(self, steps: Sequence[Callable], whole: Callable, ragged: bool = False) -> None:
        self.steps, self.whole, self.ragged = steps, whole, ragged

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.steps:
            image = step(image)
        if isinstance(image, Tensor):  # of an image processor
            return image
        pixels = torch.from_numpy(np.array(image))
        return pixels if self.ragged else pixels.permute(2, 0, 1).contiguous()

    def __repr__(self) -> str:
        return repr(self.whole)


class Scale(NamedTuple):
    """The end of a transform: ``(B, 3, H, W)`` uint8 pixels to normalised floats."""

    mean: Tensor  #: ``(3, 1, 1)``.
    std: Tensor  #: ``(3, 1, 1)``.
    levels: Tensor  #: ``(1,)`` 255; a tensor, because CUDA multiplies by the reciprocal of a number.

    def to(self, device: torch.device) -> Scale:
        """The same on a device."""
        return Scale(*(t.to(device) for t in self))

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().div_(self.levels).sub_(self.mean).div_(self.std)


def split(whole: Callable, device: torch.device) -> tuple[Head, Scale] | None:
    """A host's transform as its two parts, or None where it does not end so.

    Both together are tried on an image with every level of every channel, and have to give the transform's own bits on
    the device.
    """
    steps = list(getattr(whole, "transforms", ()))
    if len(steps) < 2 or not isinstance(steps[-1], Normalize) or not isinstance(steps[-2], ToTensor):
        return None
    mean, std = (torch.as_tensor(t, dtype=torch.float32).view(-1, 1, 1) for t in (steps[-1].mean, steps[-1].std))
    scale = Scale(mean, std, torch.tensor([255.0]))
    # levels that interpolation skips are tried without it
    end = agreeing(Head((), lambda image: steps[-1](steps[-2](image))), scale, device)
    return end and agreeing(Head(steps[:-2], whole), scale, device)


def agreeing(head: Head, scale: Scale, device: torch.device) -> tuple[Head, Scale] | None:
    """The parts of a transform, the second one on the device, where both together give the whole one's own bits.

    They are tried on an image with every level of every channel.
    """
    scale = scale.to(device)
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, levels[::-1]], 2).repeat(16, 0).repeat(16, 1))
    same = torch.equal(scale(head(image)[None].to(device))[0].cpu(), head.whole(image))
    return (head, scale) if same else None


class Resizer:
    """Resizing and cropping of a host's transform on tensors, on the device that they are on.

    Raises:
        InputError: The transform does more than to resize by bilinear or bicubic interpolation, to crop the centre, and
            to normalise.
    """

    def __init__(self, whole: Callable, hint: str) -> None:
        if not hasattr(whole, "transforms"):
            raise InputError(f"resize is device, but host {hint} has an image processor of its own: leave it to host")
        steps = list(whole.transforms)[:-2]
        self.steps = [s for s in steps if getattr(s, "__name__", type(s).__name__) not in TO_RGB]
        known = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
        for s in self.steps:
            if not (isinstance(s, CenterCrop) or (isinstance(s, Resize) and s.interpolation in known and s.antialias)):
                raise InputError(f"resize is device, but the transform of host {hint} has a step {s}: leave it to host")

    def __call__(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """``(B, 3, H, W)`` of a row of uint8 ``pixels``, one image after the other, of ``sizes (B, 2)`` on the CPU."""
        images = list(pixels.split((3 * sizes.prod(1)).tolist()))
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (h, w) in enumerate(sizes.tolist()):
            groups.setdefault((h, w), []).append(i)
        made: list[Tensor] = [pixels] * len(images)
        for (h, w), at in groups.items():
            x = torch.stack([images[i].view(h, w, 3) for i in at]).permute(0, 3, 1, 2)
            for step in self.steps:
                x = step(x)
            for i, image in zip(at, x, strict=True):
                made[i] = image
        return torch.stack(made).contiguous()


class Agreement(NamedTuple):
    """How near a batch that was resized on the device is to what the host's own transform makes."""

    levels: float  #: Largest difference of a pixel, in levels of 255.
    cosine: float  #: Smallest cosine of an embedding.

    @classmethod
    def of(cls, host: Any, inputs: dict[str, Tensor]) -> Agreement:
        """Of the images of a batch on an encoder."""
        sizes, whole = inputs["sizes"], host.transform()
        rows = inputs["pixels"].cpu().split((3 * sizes.prod(1)).tolist())
        pictures = (r.view(h, w, 3).numpy() for r, (h, w) in zip(rows, sizes.tolist(), strict=True))
        own = torch.stack([whole(Image.fromarray(p)) for p in pictures]).to(host.device)
        made = host.pixels(inputs)
        _, scale = split(whole, host.device)
        a, b = (host.encode_image(x).double() for x in (own, made))
        apart = ((own - made).abs() * scale.std * scale.levels).max()
        return cls(apart.item(), torch.cosine_similarity(a, b).min().item())

    def check(self) -> None:
        """Refuse what is too far away.

        Raises:
            InputError: A pixel or an embedding is.
        """
        if self.levels > MOST_LEVELS or not self.cosine >= LEAST_COSINE:
            raise InputError(
                f"resize is device, and gives {self}; at most {MOST_LEVELS:g} and at least {LEAST_COSINE:g} are "
                "accepted: leave it to host"
            )

    def __str__(self) -> str:
        return f"pixels within {self.levels:.2f} of 255 levels, cosines of embeddings at least {self.cosine:.6f}"

"""Changes of images that leave their class alone, on transformed images ``(B, 3, H, W)``.

Strengths are in the units of the host's own normalised pixels, whose standard deviation is about 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from mmsae.types import InputError


def noise(x: Tensor, strength: float) -> Tensor:
    """Gaussian noise of this standard deviation; the same batch gets the same noise."""
    key = hashlib.blake2b(x.cpu().numpy().tobytes(), digest_size=6).digest()
    g = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return x + strength * torch.randn(x.shape, generator=g).to(x.device)


def blur(x: Tensor, strength: float) -> Tensor:
    """Resolution reduced by this factor, brought back bilinearly."""
    size = [max(1, round(s / strength)) for s in x.shape[2:]]
    small = interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    return interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)


def dim(x: Tensor, strength: float) -> Tensor:
    """Brightness lowered by this much."""
    return x - strength


def contrast(x: Tensor, strength: float) -> Tensor:
    """Contrast about the image's mean times this factor."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + strength * (x - mean)


def grey(x: Tensor, strength: float) -> Tensor:
    """Mixed with its grey image by this share; 1 has no colour."""
    return torch.lerp(x, x.mean(1, keepdim=True).expand_as(x), strength)


def local_mean(x: Tensor, strength: float) -> Tensor:
    """A box filter of this odd width."""
    width = int(strength)
    return avg_pool2d(x, width, 1, width // 2, count_include_pad=False)


def generated(x: Tensor, strength: float) -> Tensor:
    """Nothing of the class is left: even rows in scrambled pieces, odd rows noise of the same colours."""
    from mmsae.evaluation.ood.sets import generated as make

    return torch.lerp(x, make(x), strength)


SHIFTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    f.__name__: f for f in (noise, blur, dim, contrast, grey, local_mean, generated)
}


def shift(changes: Mapping[str, float]) -> Callable[[Tensor], Tensor]:
    """One change after the other, by name and strength.

    Raises:
        InputError: An unknown name, or a strength that is no number.
    """
    for name, strength in changes.items():
        if name not in SHIFTS:
            raise InputError(f"change {name!r} is not one of {', '.join(SHIFTS)}")
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise InputError(f"change {name} has strength {strength!r}, expected a number")

    def apply(x: Tensor) -> Tensor:
        for name, strength in changes.items():
            x = SHIFTS[name](x, float(strength))
        return x

    return apply

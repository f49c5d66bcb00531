"""A task of zero-shot classification in a few numbers."""

import torch

from mmsae.types import Codes


class ToySAE:
    """Row top-2 of a linear map; the text side is shifted, so that a forgotten modality would be seen."""

    def __init__(self, d=6, d_sae=10, seed=0):
        self.w = torch.randn(d_sae, d, generator=torch.Generator().manual_seed(seed))

    def encode(self, x, modality=None):
        assert modality in ("image", "text")
        v, i = (x @ self.w.T + (modality == "text")).topk(2, dim=1)
        return Codes(v.clamp(min=0), i, len(self.w), modality)

    def decode(self, codes, modality=None):
        assert codes.modality == modality
        return codes.decode_with(self.w) + (modality == "text")


def task(n=200, c=7, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    classes = torch.randn(c, d, generator=g) * 3
    labels = torch.randint(0, c, (n,), generator=g)
    return classes[labels] + 4 * torch.randn(n, d, generator=g), labels, classes

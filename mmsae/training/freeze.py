"""Controls that are trained: an SAE part of whose weights stays as random as it began (arXiv 2602.14111)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

from mmsae.sae import SAE
from mmsae.types import InputError

FREEZE = ("", "decoder", "soft_decoder", "encoder")
LEAST = 0.8  #: Cosine of an atom with its start, at least, where the decoder is soft-frozen.


class Freeze(nn.Module):
    """Keeps weights of an SAE in training; biases, scales and thresholds are trained in any case.

    Args:
        what: ``decoder``: atoms stay at their start; ``soft_decoder``: the cosine of every atom with its start stays .8
            or more; ``encoder``: the encoder's weights stay at their start; empty: nothing is kept.
    """

    def __init__(self, what: str = "") -> None:
        super().__init__()
        if what not in FREEZE:
            raise InputError(f"freeze must be one of {', '.join(FREEZE[1:])} or empty, not {what!r}")
        self.what = what

    def build(self, sae: SAE) -> None:
        """Take the weights out of the training, or allocate the start of every atom, ``start_KEY (d_sae, d)``.

        Raises:
            InputError: The SAE has no such weights.
        """
        if self.what == "soft_decoder":
            for key, d in sae.dictionaries.items():
                if "weight" not in dict(d.named_parameters(recurse=False)):
                    raise InputError(
                        f"freeze 'soft_decoder' needs atoms that are weights; dictionary {d.name!r} has none"
                    )
                self.register_buffer(f"start_{key}", d.weight.detach().clone())
        elif self.what:
            part = sae.encoder if self.what == "encoder" else sae.dictionaries
            weights = [p for p in part.parameters() if p.dim() > 1]
            if not weights:
                names = (
                    sae.encoder.name if self.what == "encoder" else ", ".join(d.name for d in sae.dictionaries.values())
                )
                raise InputError(f"freeze {self.what!r} has nothing to keep: {names!r} has no weights that are trained")
            for weight in weights:
                weight.requires_grad_(False)

    @torch.no_grad()
    def start_(self, sae: SAE) -> None:
        """Take the atoms as they are as their start; before the first step."""
        for key, start in self.named_buffers():
            start.copy_(sae.dictionaries[key.removeprefix("start_")].weight)

    @torch.no_grad()
    def after_step_(self, sae: SAE) -> None:
        """Turn atoms that went too far back towards their start, to the bound and not beyond; they keep their norms."""
        for key, start in self.named_buffers():
            weight, origin = sae.dictionaries[key.removeprefix("start_")].weight, normalize(start)
            norm = weight.norm(dim=1, keepdim=True)
            along = (weight * origin).sum(1, keepdim=True)
            across = normalize(weight - along * origin)
            turned = norm * normalize(LEAST * origin + (1 - LEAST**2) ** 0.5 * across)
            weight.copy_(torch.where(along < LEAST * norm, turned, weight))

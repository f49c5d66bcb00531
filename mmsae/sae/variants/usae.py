"""Universal SAEs (USAE, arXiv 2502.03714): several hosts, one code that each of them can be decoded from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmsae.sae.losses import LossContext, Outputs, Reconstruction
from mmsae.sae.part import refuse_unpaired
from mmsae.sae.variants.sparc import decode_as
from mmsae.types import InputError


class UniversalReconstruction(Reconstruction):
    """In every step one modality is drawn; its code reconstructs all of them; in place of ``Reconstruction``.

    As published, a step moves the drawn modality's SAE alone: its encoder by all errors, its dictionary by its own
    error, the dictionaries of the others not at all. So a dictionary only ever learns from its own encoder's codes, and
    encoders learn to say what the others' dictionaries understand [R: a consequence of the published update]. Encoder
    and dictionary of each modality must be its own. The encoder here is affine where the paper's has a batch norm.

    Several processes need the strategy ``ddp_find_unused_parameters_true``, since most weights have no gradient in a
    step.

    Args:
        reduction: Unit of each error; see :class:`Reconstruction`. Errors are summed over the modalities.
    """

    name = "universal_reconstruction"
    least_modalities = 2

    def check(self, sae: Any) -> None:
        super().check(sae)
        if sae.encoder.name != "per_modality" or "shared" in sae.dictionaries:
            raise InputError(
                f"universal_reconstruction trains the SAE of one modality at a time: it needs encoder 'per_modality' "
                f"and a dictionary for each, not {sae.encoder.name!r} and {sorted(sae.dictionaries)}"
            )

    def drawn(self, outputs: Outputs, ctx: LossContext) -> str:
        """The modality of this step, the same on all ranks."""
        names = [m for m in ctx.sae.modalities if m in outputs]
        return names[int(torch.randint(len(names), (), generator=ctx.generator(37)))]

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss of pairs, or of tuples of more modalities.

        Raises:
            InputError: One modality alone, or unequal counts.
        """
        refuse_unpaired(self.name, {m: out.codes.n for m, out in outputs.items()}, two=False)
        source = self.drawn(outputs, ctx)
        codes = outputs[source].codes
        return sum(
            self.error(out.target, decode_as(codes, m, ctx, train=m == source), m, ctx) for m, out in outputs.items()
        )

"""ReLU with an L1 penalty: the convex relaxation that everything else is compared with (arXiv 2309.08600)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.types import Codes, InputError

ON = ("code", "gate")


class L1(LossTerm):
    """``coefficient * ramp * E_rows sum_i |z_i| ||d_i||``, mean over modalities, in FVU units.

    FVU units: the sum is divided by the root of the modality's total variance, so that the host's scale has no effect.

    Args:
        coefficient: Weight of the term.
        weighted: Whether every code value counts times the norm of its atom (which gets gradients), so that a free
            dictionary gains nothing by long atoms.
        on: What is penalised: ``code``, or ``gate``: the positive pre-codes, those of the gate where the encoder has
            one (arXiv 2404.16014).
        ramp: Share of the training over which the coefficient rises linearly from 0.
    """

    name = "l1"
    sparsity = True

    def __init__(self, coefficient: float = 0.1, weighted: bool = True, on: str = "code", ramp: float = 0.1) -> None:
        super().__init__()
        if on not in ON:
            raise InputError(f"l1 is taken on one of {', '.join(ON)}, not {on!r}")
        self.coefficient, self.weighted, self.on, self.ramp = coefficient, weighted, on, ramp

    def check(self, sae: Any) -> None:
        super().check(sae)
        if self.on == "gate" and sae.encoder.is_pursuit:
            raise InputError(f"l1 on 'gate' penalises positive pre-codes: encoder {sae.encoder.name!r} has none")
        odd = [m for m in sae.modalities if getattr(sae.dictionary(m), "norm", "free") != "unit"]
        if odd and not self.weighted:
            norm = getattr(sae.dictionary(odd[0]), "norm", "free")
            raise InputError(
                "l1 that is not weighted by the atoms' norms needs dictionaries of norm 'unit': "
                f"{odd[0]}'s is {norm!r}, whose longer atoms make every penalty small"
            )

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        total = 0.0
        for m, out in outputs.items():
            codes = out.codes if self.on == "code" else Codes(out.pre.dense().relu(), None, out.codes.d_sae)
            values = codes.values.abs()
            if self.weighted:
                norms = ctx.sae.dictionary(m).rows().norm(dim=1)
                values = values * (norms if codes.indices is None else norms[codes.indices])
            total = total + values.sum(1).mean() / ctx.sae.normaliser.variance(m).sqrt()
        return self.coefficient * ctx.ramp(self.ramp) * total / len(outputs)

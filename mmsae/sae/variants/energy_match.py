"""Energy match: a concept has one cause, so a latent is as active on images as on texts (Iso-Energy, arXiv 2602.06218).

The prior of Aligned SAEs (SAE-A). Their own loss is :class:`mmsae.sae.CodeCosine` with ``mask_top=1`` on the codes of a
pursuit; the terms here state the prior itself, as the paper's later code has them, and two of them need no pairs.
"""

from __future__ import annotations

from torch import Tensor

from mmsae.kernels.pairs import paired_product
from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.sae.normaliser import mean_over_ranks
from mmsae.sae.part import refuse_unpaired
from mmsae.types import Codes, InputError

KINDS = ("energy", "ranks", "pairs")
FLOOR = 1e-5  # of energies, in units of the normalised rows' variance


def latent_mean(codes: Codes, values: Tensor) -> Tensor:
    """``(d_sae,)`` mean over the rows, of all ranks, of values that stand where those of the codes do."""
    if codes.indices is None:
        return mean_over_ranks(values.mean(0))
    total = values.new_zeros(codes.d_sae).index_add(0, codes.indices.flatten(), values.flatten())
    return mean_over_ranks(total / codes.n)


def product(a: Codes, b: Codes) -> Tensor:
    """``(d_sae,)`` mean over pairs of the product of a latent's two values."""
    if a.indices is None or b.indices is None:
        return mean_over_ranks((a.to_dense() * b.to_dense()).mean(0))
    return latent_mean(a, paired_product(a.values, a.indices, b.values, b.indices))


class EnergyMatch(LossTerm):
    """``coefficient * distance`` between the activity of latents on two modalities; E is a latent's mean square.

    Dead latents count as matched. Batches must be large enough to measure energies; ranks measure them together.

    Args:
        coefficient: Weight of the term, whose value lies in [0, 1] (``energy``) or [0, 2] (``pairs``).
        by: ``energy``: ``mean_j |E_j - E'_j| / (E_j + E'_j)``, of unpaired rows, in any numbers; ``ranks``: ``log mean
            |sort(z_j) - sort(w_j)|``, the j-th latent's values compared in the order of their size, of unpaired rows in
            equal numbers on each rank (dense ``(N, d_sae)``); ``pairs``: ``mean_j E[(z_j - w_j)^2] / (E_j + E'_j)`` of
            pairs (arXiv 2606.09653).
        ramp: Share of the training over which the coefficient rises linearly from 0.
    """

    name = "energy_match"
    least_modalities = 2

    def __init__(self, coefficient: float = 0.3, by: str = "energy", ramp: float = 0.1) -> None:
        super().__init__()
        if by not in KINDS:
            raise InputError(f"energy_match compares by one of {', '.join(KINDS)}, not {by!r}")
        self.coefficient, self.by, self.ramp = coefficient, by, ramp

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss.

        Raises:
            InputError: Other than two modalities; unequal counts where ``by`` needs equal ones.
        """
        counts = {m: out.codes.n for m, out in outputs.items()}
        if self.by == "energy" and len(counts) != 2:
            raise InputError(f"energy_match compares two modalities, not {counts}")
        if self.by != "energy":
            refuse_unpaired(f"energy_match by {self.by}", counts)
        a, b = (out.codes for out in outputs.values())
        unit = sum(ctx.sae.normaliser.variance(m) for m in outputs) / 2
        if self.by == "ranks":
            apart = (a.to_dense().sort(0).values - b.to_dense().sort(0).values).abs().mean()
            value = (apart + FLOOR * unit.sqrt()).log()
        else:
            ours, theirs = (latent_mean(c, c.values.square()) for c in (a, b))
            apart = (ours - theirs).abs() if self.by == "energy" else ours + theirs - 2 * product(a, b)
            value = (apart / (ours + theirs + FLOOR * unit)).mean()
        return self.coefficient * ctx.ramp(self.ramp) * value

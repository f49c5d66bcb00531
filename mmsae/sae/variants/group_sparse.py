"""Group-sparse SAEs for pairs (GSAE and MGSAE, arXiv 2601.20028): the two codes of a pair share a support.

GSAE is TopK with one dictionary, a mean for each modality and the L2,1 penalty of the pair; MGSAE adds one random mask
on the pre-codes of both rows of a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmsae.kernels.pairs import paired_read
from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.sae.part import refuse_unpaired
from mmsae.sae.precodes import Score
from mmsae.sae.selector import AnyPreCodes, SelectContext, Selected, TopK
from mmsae.types import Codes, InputError


def _root(square: Tensor) -> Tensor:
    """Square root, whose gradient at 0 is 0 rather than infinite."""
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def group_norm(a: Codes, b: Codes) -> Tensor:
    """``(N,)`` ``sum_j sqrt(a_j^2 + b_j^2)`` of paired rows; sparse codes stay sparse."""
    if a.indices is None or b.indices is None:
        return _root(a.to_dense().square() + b.to_dense().square()).sum(1)
    shared = _root(a.values.square() + paired_read(a.indices, b.values, b.indices).square())
    alone = b.values.abs() * (1.0 - paired_read(b.indices, torch.ones_like(a.values), a.indices))
    return shared.sum(1) + alone.sum(1)


class GroupSparse(LossTerm):
    """``coefficient * ramp * E_pairs sum_j sqrt(z_j^2 + w_j^2)``: cheapest where both codes of a pair use a latent.

    Taken in units of the root of the modalities' mean variance, so that the host's scale has no effect. The penalty
    shrinks codes as L1 does: the error rises with the coefficient, and on the generated world concepts spread over more
    latents. [R]: the published coefficient is not known.

    Args:
        coefficient: Weight of the term.
        ramp: Share of the training over which the coefficient rises linearly from 0.
    """

    name = "group_sparse"
    least_modalities = 2
    sparsity = True

    def __init__(self, coefficient: float = 0.03, ramp: float = 0.1) -> None:
        super().__init__()
        self.coefficient, self.ramp = coefficient, ramp

    def check(self, sae: Any) -> None:
        super().check(sae)
        for key, dictionary in sae.dictionaries.items():
            if (norm := getattr(dictionary, "norm", None)) != "unit":
                raise InputError(
                    f"group_sparse needs dictionaries of norm 'unit', whose atoms cannot grow to make the penalty "
                    f"small: {key!r} is {dictionary.name!r} of norm {norm!r}"
                )

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss of pairs."""
        a, b = self.pair(outputs)
        unit = (sum(ctx.sae.normaliser.variance(m) for m in outputs) / 2).sqrt()
        return self.coefficient * ctx.ramp(self.ramp) * group_norm(a, b).mean() / unit


class PairMask(TopK):
    """TopK that in training leaves out, for both rows of a pair, the same random latents; in evaluation it is TopK.

    Masks are drawn from the seed, the rank and the number of batches seen, which is stored with the model. Like
    dropout, it has more latents alive, less sharp concepts and a larger error at the same k. [R]: the published rate is
    not known.

    Args:
        k: Latents kept a row.
        rate: Probability that a pair leaves out a latent; 0 is TopK.
        seed: Of the masks.
        score: What is ranked; see :class:`mmsae.sae.TopK`.
    """

    name = "pair_mask"

    def __init__(self, k: int = 32, rate: float = 0.2, seed: int = 0, score: str = "value") -> None:
        super().__init__(k, score=score)
        if not 0 <= rate < 1:
            raise InputError(f"the rate of a pair mask must be at least 0 and below 1, not {rate}")
        self.rate, self.seed = rate, seed
        self._left_out: Tensor | None = None  # of the batch that is being coded
        self.register_buffer("batches_", torch.tensor(0))
        self._batches = 0  # on the host: reading the buffer would wait for the device in every step

    def config(self) -> dict[str, Any]:
        own = super().config()
        del own["strict"]
        return own | {"rate": self.rate, "seed": self.seed}

    def check(self, sae: Any) -> None:
        if len(sae.modalities) < 2:
            raise InputError(f"selector 'pair_mask' masks pairs: it needs two modalities, not {list(sae.modalities)}")

    def loaded_(self) -> None:
        super().loaded_()
        self._batches = int(self.batches_)

    def select(self, pres: Mapping[str, AnyPreCodes], rows: Mapping[str, SelectContext]) -> dict[str, Selected]:
        """The codes of a batch; in training of pairs only.

        Raises:
            InputError: In training, one modality alone or unequal counts.
        """
        if not self.training or self.rate == 0:
            return super().select(pres, rows)
        refuse_unpaired(f"selector {self.name!r} in training", {m: len(r.target) for m, r in rows.items()}, two=False)
        first = next(iter(rows.values()))
        self._left_out = self._draw(len(first.target), len(first.dictionary.rows()), first.target.device)
        try:
            return super().select(pres, rows)
        finally:
            self._left_out = None

    def _draw(self, n: int, d_sae: int, device: torch.device) -> Tensor:
        """``(n, d_sae)`` bool: what the pairs of this batch leave out; the next call draws others."""
        ranks = torch.distributed
        rank = ranks.get_rank() if ranks.is_available() and ranks.is_initialized() else 0
        generator = torch.Generator(device)
        generator.manual_seed((self.seed * 1_000_003 + self._batches) * 1_009 + rank)
        self._batches += 1
        self.batches_.fill_(self._batches)
        return torch.rand(n, d_sae, generator=generator, device=device) < self.rate

    def score(self, rows: SelectContext) -> Score | None:
        ranked, left_out = super().score(rows), self._left_out
        if left_out is None:
            return ranked
        return lambda u, which: (u if ranked is None else ranked(u, which)).masked_fill(left_out[which], -torch.inf)

    def keep(self, pre: AnyPreCodes, indices: Tensor, linear: Tensor | None = None) -> Tensor:
        values = super().keep(pre, indices, linear)
        if self._left_out is None:
            return values
        return values * ~self._left_out.gather(1, indices)  # chosen where fewer than k are left

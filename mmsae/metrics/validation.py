"""What a training run reports of its validation data: reconstruction, sparsity and pairing, exact over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mmsae.kernels.pairs import code_cosine, code_norm
from mmsae.metrics.reconstruction import FlaggedError, ReconstructionMetrics
from mmsae.metrics.sparsity import Sparsity, summed
from mmsae.types import Codes, SAEOutput, Tokens


def _direction_sum(codes: Codes) -> Tensor:
    """``(d_sae,)`` float64 sum of the codes' rows, each at unit norm (zero rows stay zero)."""
    unit = codes.values.double() / code_norm(codes).double().clamp(min=1e-12)[:, None]
    return summed(codes, unit)


class PairCosine(Metric):
    """Mean code cosine of true pairs, and of all mismatched pairs of the data seen.

    The mean over the mismatched ones needs no pairs at all: the inner product of the two sums of unit codes holds every
    pair, and the true ones are taken off. So both values are exact and do not depend on batches or ranks.
    """

    full_state_update = False

    def __init__(self, d_sae: int, **kwargs):
        super().__init__(**kwargs)
        for name, shape in (("pair", ()), ("n", ()), ("sum_a", (d_sae,)), ("sum_b", (d_sae,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *codes: Codes) -> None:
        """Add a batch of two paired codes, or nothing (every rank must have states to sum)."""
        if not codes:
            return
        a, b = codes
        self.pair = self.pair + code_cosine(a, b).double().sum()
        self.n = self.n + a.n
        self.sum_a, self.sum_b = self.sum_a + _direction_sum(a), self.sum_b + _direction_sum(b)

    def compute(self) -> dict[str, Tensor]:
        """``code_cosine/pair`` and ``code_cosine/shuffled``, each where there were such rows on any rank."""
        out = {}
        if self.n > 0:
            out["code_cosine/pair"] = self.pair / self.n
        if self.n > 1:
            out["code_cosine/shuffled"] = (self.sum_a @ self.sum_b - self.pair) / (self.n * (self.n - 1))
        return out


class ValidationMetrics(nn.Module):
    """FVU, explained variance and cosine (per modality and joint), L0, dead and hub shares, code cosine of pairs.

    Where tokens carry flags, the squared error of each flag, too (:class:`FlaggedError`).

    Args:
        modalities: Modality names.
        d_in: ``{modality: width}``.
        d_sae: Number of latents.
        over_ranks: Whether ranks see other rows, so that figures are of all of them.
    """

    def __init__(self, modalities: Sequence[str], d_in: Mapping[str, int], d_sae: int, over_ranks: bool = True):
        super().__init__()
        self.reconstruction = ReconstructionMetrics(d_in)
        self.flagged = FlaggedError()
        self.sparsity = nn.ModuleDict({m: Sparsity(d_sae) for m in modalities})
        self.pairs = PairCosine(d_sae)
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.sync_on_compute = over_ranks

    @torch.no_grad()
    def update(self, batch: Tokens, outputs: Mapping[str, SAEOutput]) -> None:
        """Add one batch. Codes of pairs are compared where the batch is paired."""
        self.reconstruction.update({m: out.x_hat for m, out in outputs.items()}, {m: batch.x[m] for m in outputs})
        for m, out in outputs.items():
            self.sparsity[m].update(out.codes)
            special, role = ((column or {}).get(m) for column in (batch.special, batch.role))
            self.flagged.update(out.x_hat, batch.x[m], special, role)
        paired = len(outputs) == 2 and batch.paired()
        self.pairs.update(*(out.codes for out in outputs.values()) if paired else ())

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name, e.g. ``fvu/image``, ``l0/text``, ``code_cosine/pair``."""
        report = dict(self.reconstruction.compute())
        for m, metric in self.sparsity.items():
            stats = metric.compute()
            if stats.rows > 0:
                report[f"l0/{m}"] = stats.l0
                report[f"dead/{m}"] = stats.dead_fraction
                report[f"hub/{m}"] = stats.hub_fraction
        return report | self.flagged.compute() | self.pairs.compute()

    def reset(self) -> None:
        """Forget everything."""
        for module in (self.reconstruction, self.flagged, *self.sparsity.values(), self.pairs):
            module.reset()

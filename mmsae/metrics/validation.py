"""What a training run reports of its validation data: reconstruction, sparsity and pairing, exact over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mmsae.kernels.pairs import code_cosine
from mmsae.metrics.reconstruction import Reconstruction
from mmsae.metrics.sparsity import Sparsity
from mmsae.types import Codes, SAEOutput, Tokens


class PairCosine(Metric):
    """Mean code cosine of true pairs, and of rows half a batch apart (every row meets another row's partner)."""

    full_state_update = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name in ("pair", "shuffled", "n_pair", "n_shuffled"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *codes: Codes) -> None:
        """Add a batch of two paired codes, or nothing (every rank must have states to sum)."""
        if not codes:
            return
        a, b = codes
        self.pair = self.pair + code_cosine(a, b).double().sum()
        self.n_pair = self.n_pair + a.n
        if b.n > 1:
            shift = (torch.arange(b.n, device=b.values.device) + b.n // 2) % b.n
            self.shuffled = self.shuffled + code_cosine(a, b.rows(shift)).double().sum()
            self.n_shuffled = self.n_shuffled + a.n

    def compute(self) -> dict[str, Tensor]:
        """``code_cosine/pair`` and ``code_cosine/shuffled``, each where there were such rows on any rank."""
        means = {"pair": (self.pair, self.n_pair), "shuffled": (self.shuffled, self.n_shuffled)}
        return {f"code_cosine/{name}": total / n for name, (total, n) in means.items() if n > 0}


class ValidationMetrics(nn.Module):
    """FVU, explained variance and cosine (per modality and joint), L0, dead and hub shares, code cosine of pairs.

    Args:
        modalities: Modality names.
        d_in: ``{modality: width}``.
        d_sae: Number of latents.
    """

    def __init__(self, modalities: Sequence[str], d_in: Mapping[str, int], d_sae: int):
        super().__init__()
        self.reconstruction = Reconstruction(d_in)
        self.sparsity = nn.ModuleDict({m: Sparsity(d_sae) for m in modalities})
        self.pairs = PairCosine()

    @torch.no_grad()
    def update(self, batch: Tokens, outputs: Mapping[str, SAEOutput]) -> None:
        """Add one batch. Codes of pairs are compared where the batch is paired."""
        self.reconstruction.update({m: out.x_hat for m, out in outputs.items()}, {m: batch.x[m] for m in outputs})
        for m, out in outputs.items():
            self.sparsity[m].update(out.codes)
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
        return report | self.pairs.compute()

    def reset(self) -> None:
        """Forget everything."""
        for module in (self.reconstruction, *self.sparsity.values(), self.pairs):
            module.reset()

"""What a training run reports of its validation data: reconstruction, sparsity and pairing, exact over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmsae.kernels.pairs import code_cosine
from mmsae.metrics.reconstruction import Reconstruction
from mmsae.metrics.sparsity import Sparsity
from mmsae.types import SAEOutput, Tokens


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
        self.pair = nn.ModuleDict({name: MeanMetric() for name in ("pair", "shuffled")})
        self.has_pairs = False

    @torch.no_grad()
    def update(self, batch: Tokens, outputs: Mapping[str, SAEOutput]) -> None:
        """Add one batch. Codes of pairs are compared where the batch is paired."""
        self.reconstruction.update({m: out.x_hat for m, out in outputs.items()}, {m: batch.x[m] for m in outputs})
        for m, out in outputs.items():
            self.sparsity[m].update(out.codes)
        if len(outputs) == 2 and batch.paired():
            self.has_pairs = True
            a, b = (out.codes for out in outputs.values())
            self.pair["pair"].update(code_cosine(a, b))
            if b.n > 1:  # half a batch away: every row meets another row's partner
                shift = (torch.arange(b.n, device=b.values.device) + b.n // 2) % b.n
                self.pair["shuffled"].update(code_cosine(a, b.rows(shift)))

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name, e.g. ``fvu/image``, ``l0/text``, ``code_cosine/pair``."""
        report = dict(self.reconstruction.compute())
        for m, metric in self.sparsity.items():
            stats = metric.compute()
            if stats.rows > 0:
                report[f"l0/{m}"] = stats.l0
                report[f"dead/{m}"] = stats.dead_fraction
                report[f"hub/{m}"] = stats.hub_fraction
        if self.has_pairs:
            report |= {f"code_cosine/{name}": metric.compute() for name, metric in self.pair.items()}
        return report

    def reset(self) -> None:
        """Forget everything."""
        for module in (self.reconstruction, *self.sparsity.values(), *self.pair.values()):
            module.reset()

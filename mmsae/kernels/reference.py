"""The reference: dense formulas as one would write them down, whose gradients are torch's own, in any precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmsae.kernels.backend import Backend, Ranking


def dense(values: Tensor, indices: Tensor, n_rows: int) -> Tensor:
    """``(N, n_rows)`` matrix of a code."""
    return values.new_zeros(len(values), n_rows).scatter_add(1, indices, values)


class ReferenceBackend(Backend):
    """Builds every ``(N, F)`` matrix; what the others are compared with."""

    name = "reference"

    def chunks(self, n: int, width: int, device: torch.device) -> Iterator[slice]:
        yield from [slice(0, n)] if n else []

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str = "fp32") -> Tensor:
        u = self.dense_product(x, weight, precision)
        if precision == "bf16":
            return (u if bias is None else u + bias.bfloat16()).bfloat16()
        return u if bias is None else u + bias

    def dense_product(self, x: Tensor, weight: Tensor, precision: str = "fp32") -> Tensor:
        if precision == "bf16":  # operands are rounded, sums are not
            return x.bfloat16().to(x.dtype) @ weight.bfloat16().to(x.dtype).T
        return x @ weight.T

    def topk(self, matrix: Tensor, k: int, ranking: Ranking | None = None) -> tuple[Tensor, Tensor]:
        ranked = matrix if ranking is None else ranking(matrix)
        indices = ranked.argsort(dim=1, descending=True, stable=True)[:, :k]
        return matrix.gather(1, indices), indices

    def threshold(self, scores: Tensor, budget: int) -> Tensor:
        kept = scores[scores > 0].sort(descending=True).values[:budget]
        return kept[-1] if len(kept) else scores.new_full((), torch.inf)

    def above(
        self, scores: Tensor, threshold: Tensor, least: int = 1, inclusive: bool = False
    ) -> tuple[Tensor, Tensor]:
        threshold = threshold.reshape(-1)  # 0-dim numbers would be rounded to the scores' precision
        on = scores >= threshold if inclusive else scores > threshold
        most = int(on.sum(1).max()) if len(on) else 0
        ids = on.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : max(least, most)]
        return ids, on.gather(1, ids)

    def group_max(self, matrix: Tensor, groups: int) -> Tensor:
        size = matrix.shape[1] // groups
        return torch.stack([part.argmax(1) + i * size for i, part in enumerate(matrix.split(size, 1))], 1)

    def decode(self, values: Tensor, indices: Tensor, atoms: Tensor, bias: Tensor | None = None) -> Tensor:
        out = dense(values, indices, len(atoms)).to(atoms.dtype) @ atoms
        return out if bias is None else out + bias

    def entries(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        values: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        u = x @ weight.T
        u = u if scale is None else u * scale
        u = u if bias is None else u + bias
        return u.gather(1, indices)

    def sums(self, values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
        return dense(values, indices, n_rows).to(x.dtype).T @ x

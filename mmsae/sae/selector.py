"""Selectors: which pre-codes become the code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmsae.sae.encoder import PreCodes
from mmsae.types import InputError


class Selector(nn.Module):
    """Base of selectors."""

    name: str
    couples_batch = False  #: Whether the code of a row depends on the other rows of the batch in training.

    def config(self) -> dict:
        """Arguments that rebuild this part."""
        raise NotImplementedError

    def build(self, d_sae: int) -> None:
        """Check against the number of latents, allocate state."""

    def forward(self, pre: PreCodes, modality: str) -> tuple[Tensor, Tensor | None]:
        """Returns ``(values (N, k), indices (N, k))``, or ``(values (N, d_sae), None)`` for dense families."""
        raise NotImplementedError


class TopK(Selector):
    """The k largest pre-codes of each row, ReLU'd; gradients reach the kept entries only.

    Args:
        k: Latents kept a row. A row with fewer than k positive pre-codes has L0 < k.
        strict: The published VL-SAE rule: keep entries strictly above the (k+1)-th largest, so that ties at the
            boundary keep fewer; needs k < d_sae. Without ties both rules are equal.
    """

    name = "topk"

    def __init__(self, k: int = 32, strict: bool = False):
        super().__init__()
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        self.strict = strict
        # a buffer, since it changes results and may be annealed; the host copy avoids a device sync in every step
        self.register_buffer("k_", torch.tensor(k))
        self._k = k

    @property
    def k(self) -> int:
        """Latents kept a row."""
        return self._k

    def set_k(self, k: int) -> None:
        """Change k (annealing)."""
        self.k_.fill_(k)
        self._k = k

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._k = int(self.k_)

    def config(self) -> dict:
        return {"k": self._k, "strict": self.strict}

    def build(self, d_sae: int) -> None:
        """Check that k is at most d_sae, and below it with ``strict``."""
        if self._k > d_sae or (self.strict and self._k == d_sae):
            why = " (strict needs k < d_sae)" if self.strict else ""
            raise InputError(f"k = {self._k} does not fit d_sae = {d_sae}{why}")

    def forward(self, pre: PreCodes, modality: str) -> tuple[Tensor, Tensor]:
        linear, indices = pre.topk(self._k + self.strict)
        if self.strict:
            linear, order = linear.sort(dim=1, descending=True)
            indices = indices.gather(1, order)[:, :-1]
            above = linear[:, :-1] > linear[:, -1:]
            linear = linear[:, :-1]
        values = pre.at(indices, linear).relu()
        return values * above if self.strict else values, indices

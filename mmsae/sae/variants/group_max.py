"""Group-max (the ``groupmax`` activation of EleutherAI's sparsify): one latent for each of k groups of latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmsae.kernels import backend_for
from mmsae.sae.selector import AnyPreCodes, SelectContext, Selected, Selector
from mmsae.types import InputError


class GroupMax(Selector):
    """The largest pre-code of each of k groups of neighbouring latents, ReLU'd.

    It needs no ranking over all latents; latents of one group exclude each other.

    Args:
        k: Groups, and so latents kept a row; it divides the number of latents.
    """

    name = "group_max"
    by_place = alike = True

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        self.k = k

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Check that the latents are k groups of equal size."""
        if d_sae % self.k:
            raise InputError(f"group_max needs groups of equal size: k = {self.k} does not divide d_sae = {d_sae}")

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        scores = pre.scores()
        indices = backend_for(scores).group_max(scores, self.k)
        return pre.at(indices).relu(), indices

"""Codes turned round: for every latent the items on which it fires, so that a query reads only its own latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmsae.types import Codes

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class InvertedLists:
    """Latent by latent the items on which it fires, and its values there; a
    :class:`~mmsae.metrics.concepts.query.LatentLists`. Memory is linear in the entries that are not 0.

    Args:
        start: ``(d_sae + 1,)`` where each latent's entries begin.
        item: ``(entries,)`` items, ascending within a latent.
        value: ``(entries,)`` values.
        width: Number of items.
    """

    def __init__(self, start: np.ndarray, item: np.ndarray, value: np.ndarray, width: int) -> None:
        self.start, self.item, self.value, self.width = start, item, value, width

    @property
    def n(self) -> int:
        """Number of latents."""
        return len(self.start) - 1

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Items on which a latent fires, and its values."""
        at = slice(int(self.start[i]), int(self.start[i + 1]))
        return self.item[at], self.value[at]

    @classmethod
    def of(cls, codes: Codes | csr_matrix) -> InvertedLists:
        """Those of codes, or of a sparse matrix ``(n, d_sae)``."""
        from scipy.sparse import csr_matrix

        if isinstance(codes, Codes):
            values = codes.values.detach().cpu().float().numpy()
            if codes.indices is None:
                matrix = csr_matrix(values)
            else:
                start = np.arange(len(values) + 1, dtype=np.int64) * values.shape[1]
                ids = codes.indices.cpu().numpy().astype(np.int32).ravel()
                matrix = csr_matrix((values.ravel(), ids, start), shape=(len(values), codes.d_sae))
        else:
            matrix = codes
        turned = matrix.tocsc()
        turned.eliminate_zeros()
        return cls(turned.indptr, turned.indices, turned.data, matrix.shape[0])

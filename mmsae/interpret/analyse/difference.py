"""What two corpora differ in: concepts that are in more items of one than of the other, with the false discovery rate.

Section 9 of the toolkit of arXiv 2512.10092 compares shares; tests, intervals, pairs and the grouping of latents that
fire together are this package's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.interpret.analyse.corpora import Corpus, counts, presence
from mmsae.interpret.analyse.options import Differing
from mmsae.metrics.shares import ShareDifference, benjamini_hochberg, paired_proportions, two_proportions
from mmsae.types import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

GROUPED = 2000  # differences that are looked through for latents that fire together


class Differences(NamedTuple):
    """Every latent's difference, ``(d_sae,)`` each."""

    shares: ShareDifference  #: Shares of A and B, differences, intervals and p values
    q: np.ndarray  #: Adjusted p values; NaN of latents that fire on too few items to be tested
    order: np.ndarray  #: Latents that were tested, the largest differences that pass the FDR first, then the others
    leader: np.ndarray  #: The first latent in this order that fires on the same items; -1 of those not tested
    n: tuple[int, int]  #: Items of A and of B

    def found(self, fdr: float = 0.05) -> np.ndarray:
        """Latents whose difference passes, in order, one of each group."""
        order = self.order[self.q[self.order] <= fdr]
        return order[self.leader[order] == order]

    def rows(self, names: dict[int, str]) -> list[dict[str, Any]]:
        """A row for every latent that was tested, in order."""
        s = self.shares
        columns = {"share_a": s.a, "share_b": s.b, "difference": s.difference, "low": s.low, "high": s.high,
                   "relative": s.relative, "z": s.z, "p": s.p, "q": self.q}  # fmt: skip
        return [
            {"latent": j, "name": names.get(j, ""), **{k: float(v[j]) for k, v in columns.items()},
             "exact": bool(s.exact[j]), "leader": int(self.leader[j])}
            for j in self.order.tolist()
        ]  # fmt: skip


def difference(a: csr_matrix, b: csr_matrix, given: Differing = Differing(), min_items: int = 1) -> Differences:
    """What two corpora differ in.

    Args:
        a: ``(n_a, d_sae)`` 0 and 1, see :func:`mmsae.interpret.analyse.corpora.presence`.
        b: ``(n_b, d_sae)``; with ``given.paired`` its rows are the same items as those of ``a``.
        given: What counts as a difference.
        min_items: A latent in fewer items of both together is not tested.

    Raises:
        InputError: A side without items, or paired sides of different number.
    """
    x, y = counts(a), counts(b)
    if given.paired:
        if a.shape != b.shape:
            raise InputError(f"paired sides have {a.shape[0]} and {b.shape[0]} items; they must be the same ones")
        both = counts(a.multiply(b).tocsr())
        shares = paired_proportions(x - both, y - both, both, a.shape[0])
    else:
        shares = two_proportions(x, a.shape[0], y, b.shape[0])
    tested = x + y >= max(min_items, 1)
    q = benjamini_hochberg(np.where(tested, shares.p, np.nan))
    size = np.abs(getattr(shares, given.order))
    latents = np.flatnonzero(tested)
    order = latents[np.lexsort((latents, -size[latents], q[latents] > given.fdr))]
    return Differences(shares, q, order, _leaders(a, b, order, q, given), (a.shape[0], b.shape[0]))


def _leaders(a: csr_matrix, b: csr_matrix, order: np.ndarray, q: np.ndarray, given: Differing) -> np.ndarray:
    """``(d_sae,)`` whom each latent is listed under: the first before it that fires on the same items."""
    from scipy.sparse import vstack

    leader = np.full(a.shape[1], -1)
    leader[order] = order
    some = order[q[order] <= given.fdr][:GROUPED]
    both = vstack([a, b], format="csc")[:, some]
    together = (both.T @ both).tocsr()
    size = together.diagonal()
    free = np.ones(len(some), bool)
    for i in range(len(some)):  # over the differences that were found, not over latents or items
        if free[i]:
            at = slice(together.indptr[i], together.indptr[i + 1])
            other, common = together.indices[at], together.data[at]
            near = other[(common >= given.same * (size[i] + size[other] - common)) & free[other]]
            free[near] = False
            leader[some[near]] = some[i]
    return leader


def compare(
    a: Corpus, b: Corpus, modality: str, given: Differing, above: float = 0.0, min_items: int = 1
) -> tuple[Differences, Corpus, Corpus]:
    """The differences of two corpora, and the corpora as they were compared: without near-duplicates, or matched."""
    if given.paired:
        a, b = matched(a, b, given.paired)
    elif not given.copies:
        a, b = a.without_copies(), b.without_copies()
    return difference(*presence([a.codes(modality), b.codes(modality)], above), given, min_items), a, b


def matched(a: Corpus, b: Corpus, column: str) -> tuple[Corpus, Corpus]:
    """The items that two corpora have in common by ``uid`` or ``key``, in one order.

    Raises:
        InputError: One corpus has a value twice, or they have nothing in common.
    """
    known = []
    for side in (a, b):
        values = getattr(side.evidence.items, column)
        index = {values[row]: row for row in side.rows.tolist()}
        if len(index) < side.n:
            raise InputError(f"{side.evidence.folder} has {side.n} items and {len(index)} different values of {column}")
        known.append(index)
    common = [v for v in known[0] if v in known[1]]
    if not common:
        raise InputError(f"{a.evidence.folder} and {b.evidence.folder} have no {column} in common")
    return tuple(side._replace(rows=np.array([i[v] for v in common])) for side, i in zip((a, b), known, strict=True))

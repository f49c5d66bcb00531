"""Which concepts are present in which items of a corpus: a sparse table of bits, from calibrated codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmsae.interpret.scenarios.options import Mining
from mmsae.metrics.concepts.names import LatentName
from mmsae.types import InputError

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

    from mmsae.interpret.evidence.folder import Evidence


SHOWN = 8  # names of concepts that a sentence lists


class LeftOut(NamedTuple):
    """Latents that fire and are no part of any situation, each counted once, for the first reason that holds."""

    unnamed: int = 0  #: They have no name
    badly_named: int = 0  #: Their names' AUROC is too low
    dense: list[str] = []  #: Names of those that are present in too many items, the commonest first

    def said(self, options: Mining) -> str:
        """A sentence; empty where nothing was left out."""
        parts = []
        if self.dense:
            names = ", ".join(self.dense[:SHOWN]) + (", and others" if len(self.dense) > SHOWN else "")
            parts.append(
                f"{len(self.dense):,} that are present in more than {options.dense:.0%} of the items (--dense): {names}"
            )
        if self.badly_named:
            parts.append(f"{self.badly_named:,} whose name has an AUROC below {options.auroc:g} (--auroc)")
        if self.unnamed:
            parts.append(f"{self.unnamed:,} without a name (--unnamed)")
        return (
            "No situation can have these concepts, which were left out of mining: " + "; ".join(parts) if parts else ""
        )


class Concepts(NamedTuple):
    """F concepts in n items."""

    table: csc_matrix  #: ``(n, F) bool`` whether a concept is present
    latents: np.ndarray  #: ``(F,)`` their latents
    names: list[str]  #: Their names; ``#12`` where a latent has none
    left_out: LeftOut = LeftOut()  #: What else fires

    @property
    def n(self) -> int:
        """Number of items."""
        return self.table.shape[0]

    def said(self, which: np.ndarray) -> str:
        """A conjunction in the query language; places of concepts below 0 are none."""
        return " & ".join(f"#{self.latents[k]}" for k in which if k >= 0)

    def called(self, which: np.ndarray) -> str:
        """A conjunction in names."""
        return " & ".join(self.names[k] for k in which if k >= 0)

    def rows(self) -> csr_matrix:
        """The same table, item by item."""
        return self.table.tocsr()


def present(matrix: csr_matrix, at: float = 0.5) -> csc_matrix:
    """``(n, d) bool``: entries above a percentile of the absolute values of their column that are not 0.

    All columns at once: entries are sorted by column and value, and a column's last ones are kept.
    """
    from scipy.sparse import coo_matrix

    entries = matrix.tocoo()
    on = entries.data != 0
    row, col, value = entries.row[on], entries.col[on], np.abs(entries.data[on])
    order = np.lexsort((value, col))
    row, col, value = row[order], col[order], value[order]
    start = np.searchsorted(col, np.arange(matrix.shape[1] + 1))
    n = np.diff(start)[col]
    # ranks count equal values by the highest, as a query's percentiles do
    last = (
        np.flatnonzero(np.append((np.diff(value) != 0) | (np.diff(col) != 0), True)) if len(value) else np.zeros(0, int)
    )
    rank = last[np.searchsorted(last, np.arange(len(value)))] + 1 - start[col]
    keep = rank > at * n
    table = coo_matrix((np.ones(int(keep.sum()), bool), (row[keep], col[keep])), shape=matrix.shape)
    return table.tocsc()


def mined_concepts(evidence: Evidence, names: Mapping[int, LatentName], options: Mining = Mining()) -> Concepts:
    """The concepts of a folder of evidence that are mined: named, not dense, and well enough named.

    Raises:
        InputError: There is none; the sentence says what they lack.
    """
    if options.modality not in evidence.modalities:
        has = ", ".join(evidence.modalities)
        raise InputError(f"{evidence.folder} has no {options.modality}: it is evidence of {has}")
    table = present(evidence.codes(options.modality).matrix(), options.present)
    held = np.diff(table.indptr)
    called, named = np.zeros((2, table.shape[1]), bool)
    for j, said in names.items():
        called[j] = bool(said.name)
        named[j] = called[j] and not said.auroc < options.auroc
    rare = held <= options.dense * table.shape[0]
    chosen = np.flatnonzero((named | options.unnamed) & rare & (held > 0))
    if not len(chosen):
        raise InputError(
            f"{evidence.folder} has no concepts to mine: of {int((held > 0).sum())} latents that fire "
            f"{int(named.sum())} are named (mmsae name; --unnamed takes the others, too) and "
            f"{int((rare & (held > 0)).sum())} are present in at most {options.dense:.0%} of the items (--dense)"
        )
    fires, allowed = held > 0, named | options.unnamed
    dense = np.flatnonzero(fires & allowed & ~rare)
    dense = dense[np.argsort(-held[dense], kind="stable")]
    chosen_names, dense_names = (
        [names[j].name if j in names and names[j].name else f"#{j}" for j in some.tolist()] for some in (chosen, dense)
    )
    lost = fires & ~allowed
    left_out = LeftOut(int((lost & ~called).sum()), int((lost & called).sum()), dense_names)
    return Concepts(table[:, chosen], chosen, chosen_names, left_out)

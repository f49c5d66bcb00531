"""What is scored: latents with the name that each got, of an SAE or of a control, and their unseen items."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from mmsae.interpret.evidence.folder import Evidence


class Names(NamedTuple):
    """Names of L latents."""

    latents: np.ndarray  #: ``(L,)``
    phrases: list[str]  #: Name of each, or the best guess where none held up
    held: np.ndarray  #: ``(L,)`` bool: whether it held up


class Subjects:
    """Latents of one modality with their names and their items.

    Args:
        evidence: Whose latents.
        modality: By which evidence they are scored.
        names: What they are called.
        control: Empty, ``random`` (an SAE of random weights), ``shuffled`` (names of others) or ``dealt`` (items at
            random).
        negatives: Which silent items they are told from: ``random`` or ``hard``.
    """

    def __init__(self, evidence: Evidence, modality: str, names: Names, control: str = "", negatives: str = "random"):
        self.ev, self.modality, self.names, self.control, self.negatives = evidence, modality, names, control, negatives

    @property
    def latents(self) -> np.ndarray:
        """``(L,)``."""
        return self.names.latents

    @cached_property
    def positive(self) -> np.ndarray:
        """``(L, P)`` unseen items on which each fires, the strongest quantile first; -1 for none."""
        return self.ev.examples(self.modality, "test")[self.latents]

    @cached_property
    def negative(self) -> np.ndarray:
        """``(L, N)`` unseen items on which it is silent."""
        return self.ev.examples(self.modality, "test", self.negatives)[self.latents]

    @cached_property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Positives and negatives of the train half."""
        on, off = (self.ev.examples(self.modality, "train", k) for k in ("positive", self.negatives))
        return on[self.latents], off[self.latents]

    def some(self, n: int, seed: int) -> Subjects:
        """``n`` of them (0: all), those whose name held first, drawn by a seed."""
        if not n or n >= len(self.latents):
            return self
        order = np.random.default_rng(seed).permutation(len(self.latents))
        rows = np.sort(order[np.argsort(~self.names.held[order], kind="stable")][:n])
        return self.rows(rows)

    def rows(self, rows: np.ndarray) -> Subjects:
        """Those of some rows."""
        n = self.names
        kept = Names(n.latents[rows], [n.phrases[i] for i in rows.tolist()], n.held[rows])
        out = Subjects(self.ev, self.modality, kept, self.control, self.negatives)
        if self.control == "dealt":  # its items are those that were dealt
            out.positive, out.negative = self.positive[rows], self.negative[rows]
        return out

    def shuffled(self, seed: int) -> Subjects:
        """The same latents, each with the name of another that is called differently; without those for which there is
        none, whose score would be that of their own name.
        """
        others = misplaced(self.names.phrases, seed)
        moved = np.array([a != b for a, b in zip(self.names.phrases, others, strict=True)], bool)
        out = Subjects(self.ev, self.modality, self.names._replace(phrases=others), "shuffled", self.negatives)
        return out.rows(np.flatnonzero(moved))

    def dealt(self, seed: int) -> Subjects:
        """The same latents, with the unseen items of all of them, positive and negative, dealt out anew at random: what
        is at chance whatever the judge and the host, if sets are made and judged rightly.
        """
        out = Subjects(self.ev, self.modality, self.names, "dealt", self.negatives)
        items = np.concatenate([self.positive, self.negative], 1)
        items[items >= 0] = np.random.default_rng(seed).permutation(items[items >= 0])
        out.positive, out.negative = np.split(items, [self.positive.shape[1]], 1)
        out.seen = self.seen
        return out


def misplaced(phrases: list[str], seed: int) -> list[str]:
    """Every phrase in the place of one that reads differently, in a random order of a seed.

    A phrase of more than half of the places cannot leave all of them; what is left over stays as it is.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(phrases))
    order = order[np.argsort(np.array([phrases[i] for i in order.tolist()], object).astype(str), kind="stable")]
    most = max((phrases.count(p) for p in set(phrases)), default=0)
    out = list(phrases)
    for i, j in zip(order.tolist(), np.roll(order, -most).tolist(), strict=True):  # equal ones stand side by side
        out[i] = phrases[j]
    return out

"""The unseen items by which names are judged: many more than the few that are shown as examples, each positive with the
value that the latent has there.

A name says what a latent stands for. On what else it fires weakly the name need not hold, so that a positive counts by
its value; and some twenty examples say too little of one latent: the error of an AUROC of .8 is .07 for them, and .015
for :data:`MOST`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmsae.interpret.evidence.folder import Evidence

MOST = 500  # items of a latent on which it fires, and as many silent ones


class Unseen(NamedTuple):
    """Items of the test half for L latents, -1 behind the last."""

    positive: np.ndarray  #: ``(L, P)`` on which it fires, of all strengths, the strongest first
    weight: np.ndarray  #: ``(L, P) float32`` absolute values there; 0 behind the last
    negative: np.ndarray  #: ``(L, N)`` on which it is silent, drawn at random


def _first_silent(pool: np.ndarray, fires: np.ndarray, most: int) -> np.ndarray:
    """The first ``most`` of ``pool`` on which nothing fires, without a look at all of it where few items will do: of a
    million items and 65,536 latents it takes ten times as long to look.
    """
    size = 2 * most
    while True:
        silent = pool[:size][~fires[pool[:size]]]
        if len(silent) >= most or size >= len(pool):
            return silent[:most]
        size *= 8


def unseen(evidence: Evidence, modality: str, latents: np.ndarray, seed: int = 0, most: int = MOST) -> Unseen:
    """Up to ``most`` items on which each of ``latents (L,)`` fires, evenly over its values, and as many silent ones."""
    test = (evidence.items.half == "test") & (evidence.items.copy_of < 0)
    pool, lists = np.random.default_rng(seed).permutation(np.flatnonzero(test)), evidence.lists(modality)
    shape = (len(latents), most)
    out = Unseen(np.full(shape, -1), np.zeros(shape, np.float32), np.full(shape, -1))
    fires = np.zeros(evidence.n, bool)
    for row, j in enumerate(latents.tolist()):
        item, value = (np.asarray(v) for v in lists.row(j)[:2])
        on = value != 0
        fires[item[on]] = True
        on &= test[item]
        item, value = item[on], np.abs(value[on])
        order = np.lexsort((item, -value))
        order = order[np.arange(min(most, len(order))) * len(order) // max(1, min(most, len(order)))]
        silent = _first_silent(pool, fires, most)
        fires[np.asarray(lists.row(j)[0])] = False
        out.positive[row, : len(order)], out.weight[row, : len(order)] = item[order], value[order]
        out.negative[row, : len(silent)] = silent
    used = max(1, int(max((out.positive >= 0).sum(1).max(initial=0), (out.negative >= 0).sum(1).max(initial=0))))
    return Unseen(*(t[:, :used] for t in out))

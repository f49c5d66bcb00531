"""How well a filter's scores find the pairs that are known to be damaged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmsae.filtering.scorers.base import SCORES
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.metrics.statistics import auroc
from mmsae.types import Codes, InputError


def damage_auroc(
    table: str | Path, damaged: Collection[str], scores: Sequence[str] = SCORES, among: Collection[str] | None = None
) -> dict[str, float]:
    """Chance that an undamaged pair scores above a damaged one, for every score of a ``scores.parquet``.

    Samples that were unusable count neither way. ``scores`` are judged as far as they are there, ``among`` these uids
    (default: all).

    Raises:
        InputError: None of the samples is damaged, or all are.
    """
    found = pq.read_table(table)
    uids = found["uid"].to_pylist()
    bad, within = set(damaged), None if among is None else set(among)
    use = np.array([within is None or u in within for u in uids])
    wrong = np.array([u in bad for u in uids]) & use
    if not wrong.any() or (wrong == use).all():
        raise InputError(f"{table}: {int(wrong.sum())} of {int(use.sum())} samples are damaged, so there is no AUROC")
    columns = {c: torch.from_numpy(found[c].to_numpy().copy()) for c in scores if c in found.column_names}
    return {c: auroc(v[use & ~wrong], v[wrong]) for c, v in columns.items()}


class Side(NamedTuple):
    """N rows of one modality."""

    codes: Codes  #: Their codes.
    x: Tensor | None = None  #: ``(N, d)`` their host embeddings, or None to leave out the host's own scores.

    def rows(self, which: Tensor) -> Side:
        """Some of the rows."""
        return Side(self.codes.rows(which), None if self.x is None else self.x[which])


@torch.no_grad()
def pair_scores(scorer: PairScorer, image: Side, text: Side) -> dict[str, Tensor]:
    """``{name: (N,)}`` scores of N pairs, larger for better fits: ``pair_code`` and ``pair_weighted``.

    With ``clip`` and ``clip_centred`` where both sides have embeddings and the scorer was fitted with embeddings.
    """
    scores = scorer.codes(image.codes, text.codes)
    if scorer.mean_image is not None and image.x is not None and text.x is not None:
        scores |= scorer.embeddings(image.x, text.x)
    return scores


def mismatch(scorer: PairScorer, image: Side, clean: Side, damaged: Side) -> dict[str, float]:
    """AUROC of telling clean pairs from damaged ones, per pair score; .5 is chance.

    ``damaged`` are wrong captions of the same images: swapped (``clean.rows(derangement(N, seed, same))``) or changed.
    The scorer was fitted on training pairs.

    Raises:
        InputError: Row counts differ.
    """
    if not image.codes.n == clean.codes.n == damaged.codes.n:
        raise InputError(
            f"{image.codes.n} images, {clean.codes.n} clean and {damaged.codes.n} damaged captions are not pairs"
        )
    good, bad = pair_scores(scorer, image, clean), pair_scores(scorer, image, damaged)
    return {name: auroc(good[name], bad[name]) for name in good}

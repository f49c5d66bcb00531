"""How well a filter's scores find the pairs that are known to be damaged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from mmsae.metrics.ranking import auroc
from mmsae.tasks.pair_scorer import SCORES
from mmsae.types import InputError


def damage_auroc(
    table: str | Path, damaged: Collection[str], scores: Sequence[str] = SCORES, among: Collection[str] | None = None
) -> dict[str, float]:
    """Chance that an undamaged pair scores above a damaged one, for every score of a ``scores.parquet``.

    Args:
        table: The file.
        damaged: Uids of the damaged pairs; samples that were unusable count neither way.
        scores: Columns to judge, those that are there.
        among: Uids to look at; default: all.

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

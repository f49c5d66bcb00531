"""The table of scores: one row per latent, control and scorer, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.files import read_columns
from mmsae.interpret.scores.outcomes import Scores
from mmsae.interpret.scores.subjects import Subjects

FILE, SUMMARY = "scores.parquet", "scores.json"


#: ``{control: what is scored}``.
CONTROLS = {"": "names", "shuffled": "names of others", "dealt": "items dealt at random", "random": "random weights"}


class ScoreRows(NamedTuple):
    """Scores of all kinds, column by column."""

    latent: np.ndarray  #: ``(R,) int32``
    control: np.ndarray  #: ``(R,)`` str: one of :data:`CONTROLS`
    modality: np.ndarray  #: ``(R,)`` str
    scorer: np.ndarray  #: ``(R,)`` str
    value: np.ndarray  #: ``(R,) float32``, NaN where there is none
    chance: np.ndarray  #: ``(R,) float32``
    n: np.ndarray  #: ``(R,) int32`` outcomes that it rests on
    low: np.ndarray  #: ``(R,) float32`` 95 % interval
    high: np.ndarray  #: ``(R,) float32``
    named: np.ndarray  #: ``(R,)`` bool: whether the latent's name held, or is the best guess only

    @classmethod
    def of(cls, s: Subjects, scorer: str, found: Scores) -> ScoreRows:
        """Those of one scorer."""
        n = len(found.latents)
        held = dict(zip(s.latents.tolist(), s.names.held.tolist(), strict=True))
        text = [np.full(n, v, object) for v in (s.control, s.modality, scorer)]
        numbers = [np.asarray(v, np.float32) for v in (found.value, np.full(n, found.chance))]
        return cls(
            found.latents.astype(np.int32), *text, *numbers, np.asarray(found.n, np.int32),
            np.asarray(found.low, np.float32), np.asarray(found.high, np.float32),
            np.array([held[j] for j in found.latents.tolist()], bool),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[ScoreRows]) -> ScoreRows:
        """Rows of several."""
        return cls(*(np.concatenate(v) for v in zip(*parts, strict=True)))

    def rows(self, which: np.ndarray) -> ScoreRows:
        """Some of the rows."""
        return ScoreRows(*(v[which] for v in self))

    def write(self, folder: Path) -> Path:
        """Write ``scores.parquet``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from mmsae.files import atomic_file

        columns = {k: pa.array(v.tolist(), pa.string()) if v.dtype == object else v for k, v in self._asdict().items()}
        with atomic_file(folder / FILE) as temp:
            pq.write_table(pa.table(columns), temp)
        return folder / FILE

    @classmethod
    def read(cls, folder: str | Path) -> ScoreRows:
        """Those that ``mmsae score`` wrote into a folder.

        Raises:
            InputError: It wrote other columns, or the file cannot be read.
        """
        return cls(**read_columns(Path(folder) / FILE, cls._fields, {}, "run mmsae score again"))


def summary(rows: ScoreRows, seed: int = 0) -> list[dict[str, Any]]:
    """Mean over latents of every control, modality and scorer, of latents whose name holds and of all.

    Each has ``mean`` with a bootstrap interval over latents ``low``, ``high`` (of one latent: its own), the number of
    ``latents`` and of those without a score (``missing``), ``chance``, ``outcomes`` of a latent (median), ``above``
    (share of latents whose own interval lies above chance).
    """
    import torch

    from mmsae.metrics.statistics import bootstrap_mean

    out = []
    keys = dict.fromkeys(zip(rows.scorer.tolist(), rows.modality.tolist(), rows.control.tolist(), strict=True))
    for scorer, modality, control in keys:
        group = (rows.scorer == scorer) & (rows.modality == modality) & (rows.control == control)
        for which, own in (("named", group & rows.named), ("all", group)):
            r = rows.rows(own)
            has = ~np.isnan(r.value)
            if not has.any():
                continue
            low, high = bootstrap_mean(torch.from_numpy(r.value.astype(np.float64)), seed=seed)
            if has.sum() == 1:  # of one latent nothing can be said of others: the interval is that of its outcomes
                low, high = float(r.low[has][0]), float(r.high[has][0])
            out.append(
                {"scorer": scorer, "modality": modality, "control": control, "which": which,
                 "mean": float(r.value[has].mean(dtype=np.float64)), "low": low, "high": high,
                 "chance": float(r.chance[has].mean(dtype=np.float64)), "latents": int(has.sum()),
                 "missing": int((~has).sum()), "outcomes": float(np.median(r.n[has])),
                 "above": float((r.low[has] > r.chance[has]).mean())}
            )  # fmt: skip
    return out

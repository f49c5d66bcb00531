"""The scores of ``mmsae score``, as a panel shows them: columns of the table, rows of latents, a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmsae.interpret.scores.table import FILE, ScoreRows, summary
from mmsae.types import InputError


def read_scores(folder: Path, d_sae: int) -> dict[str, Any]:
    """``columns``, ``rows`` and ``summary`` of a folder of scores; empty where there is none.

    ``columns`` are ``{"score.SCORER": (d_sae,)}`` (``score.SCORER.MODALITY`` where a scorer has several), of latents
    themselves; ``rows {latent: [[scorer, modality, control, value, chance, low, high, n]]}`` have their controls,
    too (random latents are another SAE's); ``summary`` has the mean of each scorer and control.

    Raises:
        InputError: Scores of latents that the SAE has not.
    """
    if not (folder / FILE).exists():
        return {}
    found = ScoreRows.read(folder)
    if len(found.latent) and found.latent.max() >= d_sae:
        raise InputError(f"{folder / FILE} scores latent {found.latent.max()}, the SAE has {d_sae}")
    pairs = set(zip(found.scorer.tolist(), found.modality.tolist(), strict=True))
    several = {s for s, _ in pairs if sum(t == s for t, _ in pairs) > 1}
    columns: dict[str, np.ndarray] = {}
    for scorer, modality in sorted(pairs):
        own = (found.scorer == scorer) & (found.modality == modality) & (found.control == "")
        if own.any():
            column = columns.setdefault(
                f"score.{scorer}.{modality}" if scorer in several else f"score.{scorer}",
                np.full(d_sae, np.nan, np.float32),
            )
            column[found.latent[own]] = found.value[own]
    rows: dict[int, list[Any]] = {}
    for j, control, m, scorer, *numbers, n in zip(
        *(x.tolist() for x in (found.latent, found.control, found.modality, found.scorer, found.value, found.chance,
                               found.low, found.high, found.n)), strict=True,
    ):  # fmt: skip
        if control != "random":
            rows.setdefault(j, []).append([scorer, m, control, *(None if v != v else round(v, 4) for v in numbers), n])
    return {"columns": columns, "rows": rows, "summary": [_summed(s) for s in summary(found) if s["which"] == "all"]}


def _summed(s: dict[str, Any]) -> list[Any]:
    numbers = (None if v != v else round(v, 4) for v in (s["mean"], s["chance"], s["low"], s["high"], s["above"]))
    return [s["scorer"], s["modality"], s["control"], *numbers, s["latents"]]

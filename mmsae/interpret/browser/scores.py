"""The scores of ``mmsae score``, as a panel shows them: columns of the table, rows of latents, a summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.files import read_text
from mmsae.types import InputError

TABLE, ABOUT = "scores.parquet", "scores.json"


def read_scores(folder: Path, d_sae: int) -> dict[str, Any]:
    """``columns``, ``rows`` and ``summary`` of a folder of scores; empty where there is none.

    ``columns`` are ``{"score.SCORER": (d_sae,)}`` (``score.SCORER.MODALITY`` where a scorer has several), of latents
    themselves; ``rows {latent: [[scorer, modality, control, value, chance, low, high, n]]}`` have their controls, too;
    ``summary`` has the mean of each scorer and control.

    Raises:
        InputError: The table has not the columns that ``mmsae score`` writes, or latents that the SAE has not.
    """
    if not (folder / TABLE).exists():
        return {}
    import pyarrow.parquet as pq

    table = pq.read_table(folder / TABLE)
    needed = ("latent", "control", "modality", "scorer", "value", "chance", "n", "low", "high")
    if missing := [c for c in needed if c not in table.column_names]:
        raise InputError(f"{folder / TABLE} has no column {missing[0]}: mmsae score writes {', '.join(needed)}")
    c = {name: table[name].to_pylist() for name in needed}
    if table.num_rows and max(c["latent"]) >= d_sae:
        raise InputError(f"{folder / TABLE} scores latent {max(c['latent'])}, the SAE has {d_sae}")
    pairs = set(zip(c["scorer"], c["modality"], strict=True))
    several = {s for s, _ in pairs if sum(t == s for t, _ in pairs) > 1}
    columns: dict[str, np.ndarray] = {}
    rows: dict[int, list[Any]] = {}
    means: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for j, control, m, scorer, value, chance, n, low, high in zip(*(c[k] for k in needed), strict=True):
        plain = [None if v is None or v != v else round(float(v), 4) for v in (value, chance, low, high)]
        if not control:
            name = f"score.{scorer}.{m}" if scorer in several else f"score.{scorer}"
            columns.setdefault(name, np.full(d_sae, np.nan, np.float32))[j] = np.nan if value is None else value
        if control != "random":  # those are latents of another SAE
            rows.setdefault(j, []).append([scorer, m, control, *plain, n])
        if plain[0] is not None:
            means.setdefault((scorer, m, control), []).append((plain[0], plain[1] or 0.0))
    summary = [
        [*key, *(round(float(v), 4) for v in np.mean(found, 0)), len(found)] for key, found in sorted(means.items())
    ]
    return {"columns": columns, "rows": rows, "summary": summary, "about": _about(folder / ABOUT)}


def _about(path: Path) -> Any:
    return json.loads(read_text(path)) if path.exists() else {}

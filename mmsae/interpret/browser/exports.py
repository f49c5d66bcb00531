"""Files for other tools: a table of latents with coordinates, and dashboards feature by feature."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.files import atomic_file
from mmsae.interpret.evidence.folder import EDGES
from mmsae.metrics.concepts.names import LatentName

KINDS = ("dead", "image only", "text only", "image and text")


def write_table(
    path: Path, columns: Mapping[str, np.ndarray], names: Mapping[int, LatentName], words: list[list[tuple[str, int]]]
) -> Path:
    """Write a parquet of all latents: number, name, words, what the table of the browser has, and ``x``, ``y`` where
    there is a map; Embedding Atlas opens it (``--x x --y y --text text``).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    d_sae = len(words)
    name = [names[j].name if j in names else None for j in range(d_sae)]
    said = [" ".join(w for w, _ in x) for x in words]
    table = {
        "latent": np.arange(d_sae, dtype=np.int32),
        "name": pa.array(name, pa.string()),
        "words": said,
        "text": [f"#{j} {n or w}".strip() for j, (n, w) in enumerate(zip(name, said, strict=True))],
        **columns,
    }
    with atomic_file(path) as temp:
        pq.write_table(pa.table(table), temp)
    return path


def feature_lines(
    j: int, modality: str, stats: Any, n: int, shown: Mapping[str, Any], near: tuple[np.ndarray, np.ndarray] | None,
    name: LatentName | None, words: list[tuple[str, int]],
) -> str:  # fmt: skip
    """One line of ``features.jsonl``: a latent in one modality, with the keys of public dashboards.

    Args:
        j: The latent.
        modality: Its modality.
        stats: Statistics of all latents in it.
        n: Items of the corpus.
        shown: ``item``: uids of its examples, ``value``, ``position``, ``part``: 0 for top items, else the part of its
            values that they are from, 1 the strongest; ``parts``: how many.
        near: Nearest latents and cosines.
        name: Its name.
        words: Words of its captions.
    """
    histogram = np.asarray(stats.histogram[j])
    used = np.flatnonzero(histogram)
    cut = slice(used[0], used[-1] + 1) if len(used) else slice(0, 0)
    scores = {} if name is None else {k: v for k, v in name.to_dict().items() if k in ("score", "margin", "z", "auroc")}
    most = float(stats.max[j])
    line = {
        "feature_index": j,
        "modality": modality,
        "density": int(stats.fired_items[j]) / max(n, 1),
        "max": most,
        "hist_heights": histogram[cut].tolist(),
        "hist_values": np.sqrt(EDGES[:-1] * EDGES[1:])[cut].round(6).tolist(),
        "top_words": [w for w, _ in words],
        "top_words_values": [c for _, c in words],
        "bottom_words": [],
        "bottom_words_values": [],
        "similar_indices": [] if near is None else [int(k) for k in near[0] if k >= 0],
        "similar_values": [] if near is None else [round(float(v), 4) for k, v in zip(*near, strict=True) if k >= 0],
        "explanation": None
        if name is None
        else {"text": name.name, "method": name.method, "by": name.by, "scores": scores},
        "activations": [
            {"item_id": uid, "value": round(float(v), 5), "argmax": int(p), "bin": int(q),
             "bin_share": 1 / shown["parts"] if q else None}
            for uid, v, p, q in zip(shown["item"], shown["value"], shown["position"], shown["part"], strict=True)
        ],
    }  # fmt: skip
    return json.dumps(line, ensure_ascii=False)


def write_lines(path: Path, lines: Iterator[str]) -> Path:
    """Write lines as they come."""
    with atomic_file(path) as temp, open(temp, "w", encoding="utf-8") as f:
        for line in lines:
            f.write(line + "\n")
    return path

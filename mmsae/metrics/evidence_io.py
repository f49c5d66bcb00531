"""Files of concept evidence: our JSON and parquet, and the concept JSON that VL-SAE publishes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.metrics.concepts.evidence import TopTable
from mmsae.types import IMAGE, TEXT, InputError

FORMAT = "mmsae-evidence"
VERSION = 1
PARQUET = {
    "latent": "int64",
    "modality": "string",
    "rank": "int64",
    "uid": "string",
    "value": "float32",
    "caption": "string",
    "n_fired": "int64",
    "mean_active": "float64",
}


class Sample(NamedTuple):
    """One top sample of a latent.

    Attributes:
        uid: Sample id; the file name for published VL-SAE concepts.
        value: Activation, or None where the file has none.
        text: Caption, or None.
        url: Where the image was found, or None.
    """

    uid: str
    value: float | None = None
    text: str | None = None
    url: str | None = None


class LatentEvidence(NamedTuple):
    """What is known about one latent.

    Attributes:
        top: ``{modality: samples}``, best first.
        n_fired: ``{modality: rows in which it fired}``; empty where unknown.
        mean_active: ``{modality: mean value over those rows}``; empty where unknown.
        mean_activation: Mean value over all rows, zeros included, averaged over the modalities.
    """

    top: dict[str, list[Sample]]
    n_fired: dict[str, int]
    mean_active: dict[str, float]
    mean_activation: float


def latent_evidence(
    tables: Mapping[str, TopTable], captions: Mapping[str, str] | None = None
) -> dict[int, LatentEvidence]:
    """Evidence of every latent that fired, from ``{modality: table}``; ``captions`` maps uid to caption."""
    captions = captions or {}
    fired = {m: t.n_fired.tolist() for m, t in tables.items()}
    mean = {m: t.mean_active.tolist() for m, t in tables.items()}
    out = {}
    for j in range(len(next(iter(fired.values())))):
        if any(f[j] for f in fired.values()):
            overall = [fired[m][j] * mean[m][j] / max(t.rows, 1) for m, t in tables.items()]
            top = {m: [Sample(u, v, captions.get(u)) for u, v in t.top(j)] for m, t in tables.items()}
            out[j] = LatentEvidence(
                top,
                {m: f[j] for m, f in fired.items()},
                {m: v[j] for m, v in mean.items()},
                sum(overall) / len(overall),
            )
    return out


def save_evidence(
    path: str | os.PathLike, tables: Mapping[str, TopTable], captions: Mapping[str, str] | None = None
) -> Path:
    """Write evidence to ``path``: ``.json`` (everything) or ``.parquet`` (one row per latent, modality and sample).

    Written by temporary name and rename. Latents that never fired are left out.

    Raises:
        InputError: Another suffix.
    """
    path = Path(path)
    if path.suffix not in (".json", ".parquet"):
        raise InputError(f"evidence is written as .json or .parquet, not as {path.suffix!r} ({path})")
    latents = latent_evidence(tables, captions)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".json":
        body = {
            "format": FORMAT,
            "version": VERSION,
            "d_sae": len(next(iter(tables.values())).values),
            "rows": {m: t.rows for m, t in tables.items()},
            "latents": {str(j): _to_json(e) for j, e in latents.items()},
        }
        part.write_text(json.dumps(body, ensure_ascii=False))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            (j, m, rank, s.uid, s.value, s.text, e.n_fired[m], e.mean_active[m])
            for j, e in latents.items()
            for m, samples in e.top.items()
            for rank, s in enumerate(samples)
        ]
        columns = zip(*rows, strict=True) if rows else [[]] * len(PARQUET)
        arrays = [pa.array(list(c), kind) for c, kind in zip(columns, PARQUET.values(), strict=True)]
        pq.write_table(pa.table(arrays, names=list(PARQUET)), part)
    os.replace(part, path)
    return path


def _to_json(e: LatentEvidence) -> dict[str, Any]:
    top = {m: [{k: v for k, v in s._asdict().items() if v is not None} for s in ss] for m, ss in e.top.items()}
    return {**e._asdict(), "top": top}


def load_evidence(path: str | os.PathLike) -> dict[int, LatentEvidence]:
    """Read our JSON, or the concept JSON published with VL-SAE; told apart by content.

    Published files list the captions and images of each unit without values, dead units included. A leading
    ``<image>`` tag, which the LLaVA files keep, is removed from texts; what their path-basename step cut from captions
    with a slash is lost.

    Raises:
        InputError: Neither format, or a newer version of ours.
    """
    try:
        body = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"cannot read concept evidence from {path}: {e}") from e
    if isinstance(body, dict) and body.get("format") == FORMAT:
        if body["version"] > VERSION:
            raise InputError(f"{path} has evidence format {body['version']}, this version reads up to {VERSION}")
        return {
            int(j): LatentEvidence(**{**e, "top": {m: [Sample(**s) for s in ss] for m, ss in e["top"].items()}})
            for j, e in body["latents"].items()
        }
    if isinstance(body, dict) and body and all(isinstance(e, dict) and "mean_activation" in e for e in body.values()):
        return {int(j): _published(j, e, path) for j, e in body.items()}
    raise InputError(f"{path} holds neither {FORMAT} nor published VL-SAE concepts")


def _published(unit: str, e: Mapping[str, Any], path: str | os.PathLike) -> LatentEvidence:
    names, urls = e.get("image_names") or [], e.get("image_urls") or []
    if names and urls and len(names) != len(urls):
        raise InputError(f"{path}: unit {unit} has {len(names)} image names and {len(urls)} image urls")
    images = [Sample(n, url=u) for n, u in zip(names or urls, urls or [None] * len(names), strict=True)]
    texts = [Sample(t, text=t) for t in (t.removeprefix("<image>").strip() for t in e.get("texts") or [])]
    return LatentEvidence({IMAGE: images, TEXT: texts}, {}, {}, float(e["mean_activation"]))

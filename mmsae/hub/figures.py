"""What ``mmsae evaluate`` measured, as a section of a model card: every head's leading figures, beside controls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.errors import InputError
from mmsae.report.tables import markdown_table

RESULTS = "results.json"
SCORES = {"core": ("fvu", "L0", "dead share")}
"""Scores of a head that a card shows; of other heads it shows the first."""
MOST = 4
"""Figures of one head that a card shows."""
_BESIDE = {"random": "random weights", "pca": "PCA", "raw": "raw features"}
_OWN = ("code", "recon", "resid", "atoms")
"""What a figure of the SAE may be of; a card shows the first of them that a head has."""


def read_results(path: str | Path) -> dict[str, Any]:
    """``results.json`` of an evaluation, of its folder or the file itself.

    Raises:
        InputError: No such file, or of something else.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InputError(f"no results of mmsae evaluate at {path}: {file} is not there") from e
    except ValueError as e:
        raise InputError(f"{file} is not valid JSON: {e}") from e
    wanted = {"head", "set", "score", "features", "value", "n", "control"}
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and wanted <= r.keys() for r in rows):
        raise InputError(f"{file} is not what mmsae evaluate writes: it has no rows of figures")
    return found


def section(results: Mapping[str, Any]) -> str:
    """The text, from what :func:`read_results` gave."""
    rows = results["rows"]
    trained = list(results.get("controls", ()))
    beside = ("random", "pca", "raw", *trained)
    shown = [r for head in dict.fromkeys(r["head"] for r in rows) for r in _leading(rows, head)]
    table = []
    for r in shown:
        what = (r["head"], r["set"], f"{r['score']} ({r['features']})")
        table.append((*what, _figure(r), *(_beside(rows, r, c) for c in beside), r["n"]))
    names = ("head", "set", "score (of what)", "this SAE", *(_BESIDE.get(c, c) for c in beside), "n")
    images = ", ".join(f"{name} {n:,}" for name, n in results.get("images", {}).items())
    said = [
        f"`mmsae evaluate` with the suite *{results.get('title', results.get('suite'))}* on `{results.get('host')}`"
        + (f" (`{results['host_fingerprint']}`)" if results.get("host_fingerprint") else "")
        + f"; images: {images or 'not recorded'}; seed {results.get('seed')}"
        + ("; `--quick`: fewer images and probes, the figures are rough." if results.get("quick") else "."),
        "Intervals are 95%. Random weights: the same SAE untrained; PCA: as many components as latents are on; raw "
        "features: the host's own; n: what the interval is over. All figures are in `results.json`.",
        markdown_table(names, table),
    ]
    said += [f"- Warning: {w}" for w in results.get("warnings", ())]
    said += [f"- Left out: {head}: {why}" for head, why in results.get("skipped", {}).items()]
    return "\n\n".join(said[:3]) + ("\n\n" + "\n".join(said[3:]) if said[3:] else "")


def _leading(rows: Sequence[Mapping[str, Any]], head: str) -> list[Mapping[str, Any]]:
    """The first figures of a head that are the SAE's own, those of ``SCORES`` where it has some."""
    own = [r for r in rows if r["head"] == head and not r["control"] and r["features"] in _OWN]
    wanted = SCORES.get(head)
    if wanted:
        return [r for r in own if r["score"] in wanted][: 2 * len(wanted)]
    kind = min((_OWN.index(r["features"]) for r in own), default=0)
    own = [r for r in own if r["features"] == _OWN[kind]]
    return [r for r in own if r["score"] == own[0]["score"]][:MOST]


def _beside(rows: Iterable[Mapping[str, Any]], row: Mapping[str, Any], control: str) -> str:
    """What stands beside a figure of the SAE: a control's of the same, PCA's of what it has, the raw features'."""
    same = [r for r in rows if all(r[f] == row[f] for f in ("head", "set", "score"))]
    if control == "raw":
        found = [r for r in same if not r["control"] and r["features"] == "raw"]
    else:
        found = [r for r in same if r["control"] == control and (control == "pca" or r["features"] == row["features"])]
    found.sort(key=lambda r: r["features"] != row["features"])
    return _figure(found[0]) if found else ""


def _figure(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return ""
    ends = f" ({row['low']:.3g} to {row['high']:.3g})" if "low" in row and "high" in row else ""
    return f"{row['value']:.4g}{ends}"

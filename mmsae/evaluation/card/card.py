"""The benchmark card: the heads of a suite run one after the other, and what they found on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.evaluation.card import classes, codes, detection, splitting, top_images, yardstick  # noqa: F401  they register heads
from mmsae.evaluation.card.gallery import write_top_gallery
from mmsae.evaluation.card.page import markdown, write_card
from mmsae.evaluation.features import token_site
from mmsae.evaluation.labels import TEMPLATE_SETS
from mmsae.evaluation.ood.sets import shared_images
from mmsae.evaluation.options import EMBED, PCA, RANDOM, STATISTICS, WHITENED
from mmsae.evaluation.rows import TRAINED, write_results
from mmsae.evaluation.suite import HEADS, NotApplicable, Suite
from mmsae.evaluation.suite_data import HeadResult, SuiteData
from mmsae.files import atomic_folder, remove_leftovers
from mmsae.metrics.concepts.names import LatentName
from mmsae.report.tables import text_table
from mmsae.sae import SAE
from mmsae.types import InputError

RESULTS, PAGE, TABLES, GALLERY = "results.json", "report.html", "tables.md", "gallery.html"
TOKENS = (
    "This SAE reads tokens. Where a head takes one code an image, that is the largest value of each latent over the "
    "image's tokens (absorption and targeted perturbation: the mean), and raw features are means over them; so is the "
    "control with random weights, while pca has as many components as latents are on per token."
)
CONTROLS = (RANDOM, PCA, WHITENED, STATISTICS)
OWN = {RESULTS, PAGE, TABLES, GALLERY}


def run_heads(data: SuiteData) -> tuple[dict[str, HeadResult], dict[str, str], dict[str, float]]:
    """Run the heads of a suite one after the other.

    Returns:
        ``{head: what it found}``, ``{head: why it does not apply}`` and ``{head: seconds}``.
    """
    say = data.run.progress
    found: dict[str, HeadResult] = {}
    skipped: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name, options in data.suite.heads.items():
        if say:
            print(f"[{name}] {(HEADS[name].__doc__ or '').strip().splitlines()[0]}", flush=True)
        start = time.perf_counter()
        try:
            found[name] = HEADS[name](data, **options)
        except NotApplicable as e:
            skipped[name] = str(e)
            if say:
                print(f"  left out: {e}", flush=True)
        seconds[name] = round(time.perf_counter() - start, 2)
    return found, skipped, seconds


def check_out(out: str | Path) -> Path:
    """Refuse a folder that holds anything but an earlier evaluation, since it is replaced as a whole.

    Raises:
        InputError: With the first file that is not an evaluation's.
    """
    out = Path(out)
    if out.exists() and (other := sorted({p.name for p in out.iterdir()} - OWN) if out.is_dir() else [out.name]):
        raise InputError(f"{out} holds {other[0]}, which is not an evaluation's: give --out a folder of its own")
    return out


def check_files(suite: Suite) -> None:
    """Find everything that a suite names, before anything is computed.

    Raises:
        InputError: Shards, a tree, class names, templates or another SAE that are not there.
    """
    for name in suite.data:
        suite.paths(name)
    trees = [t for t in suite.trees.values() if t != "wordnet"]
    templates = [] if suite.templates in TEMPLATE_SETS else [suite.templates]
    for name in filter(None, [*trees, suite.classes, *templates, *suite.others.values()]):
        suite.find(name)


def overlaps(data: SuiteData) -> list[str]:
    """Warnings about sets that share images with those that probes and detectors learn from."""
    held = {n: data.features(n) for n in data.suite.data if data.loaded(n)}
    return [
        warning
        for fit in ("train", "val")
        for name, f in held.items()
        if fit in held and name not in ("train", fit)
        for warning in shared_images(name, f, held[fit].uids, fit)
    ]


def check_control(name: str, control: SAE, sae: SAE) -> None:
    """Refuse a control whose figures would differ from the SAE's for another reason than its training.

    Raises:
        InputError: Another site or another number of latents.
    """
    if name in ("", *CONTROLS):
        raise InputError(f"a control cannot be called {name!r}: {', '.join(CONTROLS)} are those of every card")
    for m, site in sae.sites.items():
        if m not in control.sites or not site.same(control.sites[m]):
            raise InputError(f"control {name!r} reads {control.sites.get(m, f'no {m}')}, this SAE {site}")
    if control.d_sae != sae.d_sae:
        raise InputError(
            f"control {name!r} has {control.d_sae:,} latents, this SAE {sae.d_sae:,}: train it by the same recipe"
        )


def control_rows(data: SuiteData, controls: Mapping[str, SAE]) -> list[dict[str, Any]]:
    """The rows of SAEs that were trained as controls, by name: what the suite's heads say of each in the SAE's place.

    Rows that are the host's, or an untrained control's, are the card's own already.
    """
    rows = []
    for name, sae in controls.items():
        if data.run.progress:
            print(f"control {name}:", flush=True)
        found = run_heads(SuiteData(data.suite, sae, data.host, data.run, data.quick, data.seed))[0]
        own = [
            r for f in found.values() for r in f.rows if r["control"] == TRAINED and r["features"] not in ("raw", EMBED)
        ]
        rows += [{**r, "control": name} for r in own]
    return rows


def run_card(
    data: SuiteData,
    folder: Path,
    sae: Mapping[str, str],
    gallery: int,
    warnings: Sequence[str],
    controls: Mapping[str, SAE] | None = None,
    names: Mapping[int, LatentName] | None = None,
) -> Path:
    """Run a suite and write the card, whose folder appears when everything is done; returns the path of the page.

    ``sae`` says which SAE it is (``sae``, ``fingerprint``), ``gallery`` is the number of latents of each kind in
    gallery.html (0: no such page), ``controls`` are trained ones by name, ``names`` what latents are called in it.
    """
    start, suite, model = time.perf_counter(), data.suite, data.sae
    found, skipped, seconds = run_heads(data)
    about: dict[str, Any] = {
        **sae, "host": data.host.hint, "host_fingerprint": data.host.fingerprint,
        "site": {m: str(s) for m, s in model.sites.items()}, "suite": suite.path,
        "root": suite.root, "title": suite.title or Path(suite.path).stem, "d_sae": model.d_sae, "seed": data.seed,
        "quick": data.quick,
        "images": {n: data.features(n).n for n in suite.data if data.loaded(n)},
        "skipped": skipped, "seconds": seconds, "notes": {k: list(f.notes) for k, f in found.items()},
        "more": {k: f.more for k, f in found.items()},
    }  # fmt: skip
    of_heads = [f"{k}: {w}" for k, f in found.items() for w in f.warnings]
    about["warnings"] = [*warnings, *data.warnings, *overlaps(data), *of_heads]
    if any(token_site(s) for s in model.sites.values()):
        about["notes"]["core"] = [*about["notes"].get("core", ()), TOKENS]
    rows = [r for f in found.values() for r in f.rows] + control_rows(data, controls or {})
    about["controls"] = list(controls or {})
    remove_leftovers(folder)
    with atomic_folder(folder) as temp:
        write_results(temp, rows, about)
        (temp / TABLES).write_text(markdown(rows), encoding="utf-8")
        write_card(temp / PAGE, rows, about)
        if gallery:
            write_top_gallery(temp / GALLERY, data, gallery, names=names or {})
    if data.run.progress:
        for warning in about["warnings"]:
            print(f"warning: {warning}")
        shown = [[r["head"], r["set"], r["score"], r["features"], r["control"] or "", r["value"], r["n"]] for r in rows]
        print(
            text_table(
                _headline(shown, list(controls or {})), ("head", "set", "score", "features", "control", "value", "n")
            )
        )
        print(f"{len(rows)} figures in {time.perf_counter() - start:.0f} s: {folder / RESULTS}")
    return folder / PAGE


def _headline(rows: Sequence[Sequence[Any]], more: Sequence[str], most: int = 3) -> list[Sequence[Any]]:
    """A few rows of every head: the first scores of the code and its controls."""
    out: list[Sequence[Any]] = []
    for name in dict.fromkeys(r[0] for r in rows):
        own = [r for r in rows if r[0] == name]
        scores = list(dict.fromkeys((r[1], r[2]) for r in own))[:most]
        out += [r for r in own if (r[1], r[2]) in scores and r[4] in ("", RANDOM, *more)]
    return out


def read_card(folder: str | Path) -> dict[str, Any]:
    """``results.json`` of an evaluation."""
    return json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))

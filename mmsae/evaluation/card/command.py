"""``mmsae evaluate``: the benchmark card of an SAE, from a suite of data and heads. One JSON file and one page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsae.evaluation.card import classes, codes, detection, splitting, top_images  # noqa: F401  they register heads
from mmsae.evaluation.card.gallery import check_host, write_top_gallery
from mmsae.evaluation.card.page import markdown, write_card
from mmsae.evaluation.features import token_site
from mmsae.evaluation.labels import TEMPLATE_SETS
from mmsae.evaluation.ood.sets import shared_images
from mmsae.evaluation.rows import write_results
from mmsae.evaluation.suite import HEADS, NotApplicable, Suite, load_suite
from mmsae.evaluation.suite_data import Data, Found
from mmsae.files import atomic_folder, remove_leftovers
from mmsae.load import load_pair, other_host_warnings
from mmsae.recipes import find_recipe
from mmsae.report.tables import text_table
from mmsae.sae import SAE
from mmsae.types import InputError

RESULTS, PAGE, TABLES, GALLERY = "results.json", "report.html", "tables.md", "gallery.html"
TOKENS = (
    "This SAE reads tokens. Where a head takes one code an image, that is the largest value of each latent over the "
    "image's tokens (absorption and targeted perturbation: the mean), and raw features are means over them; so is the "
    "control with random weights, while pca has as many components as latents are on per token."
)
OWN = {RESULTS, PAGE, TABLES, GALLERY}


def run_suite(data: Data, say: bool = True) -> tuple[dict[str, Found], dict[str, str], dict[str, float]]:
    """Run the heads of a suite one after the other.

    Returns:
        ``{head: what it found}``, ``{head: why it does not apply}`` and ``{head: seconds}``.
    """
    found: dict[str, Found] = {}
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


def overlaps(data: Data) -> list[str]:
    """Warnings about sets that share images with those that probes and detectors learn from."""
    held = {n: data.features(n) for n in data.suite.data if data.loaded(n)}
    return [
        warning
        for fit in ("train", "val")
        for name, f in held.items()
        if fit in held and name not in ("train", fit)
        for warning in shared_images(name, f, held[fit].uids, fit)
    ]


def evaluate(
    sae: str,
    suite: str,
    out: str,
    host: str = "",
    root: str = "",
    heads: list[str] = [],  # noqa: B006  jsonargparse shows it in the help; it is not changed
    quick: bool = False,
    gallery: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    allow_other_site: bool = False,
    cache: str = "",
    seed: int = 0,
    progress: bool = True,
) -> str:
    """Everything that applies of a suite, every figure with its controls and its number of samples.

    Args:
        sae: Folder or hub id of the SAE.
        suite: YAML file that says which data and which heads (configs/eval/world.yaml; docs/how-to/evaluate.md).
        out: Folder to write: results.json, tables.md and report.html. It appears when everything is done.
        host: Name of the host; default: the suite's, else that of the SAE's site.
        root: Folder that the suite's data paths are relative to; default: the suite's.
        heads: Only these heads of the suite.
        quick: At most 1,500 images a set, fewer probes and permutations.
        gallery: Write gallery.html, too: the training images that so many latents answer to most, of the purest and of
            any, with the place where they fire at token sites, and the same of random weights.
        batch_size: Images per forward pass. Default: 256; on a CPU as many as have the area of 16 images of 224 pixels.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: Of the host.
        allow_other_site: Accept an SAE that was trained on another host of equal width, such as a copy of its own.
        cache: Folder in which the host's activations are kept, so that another SAE of this site, or another of the
            commands ``ood``, ``evaluate`` and ``zeroshot``, need not run the host again; empty: none.
        seed: Of random weights, permutations and draws.
        progress: Whether to show bars and print.

    Returns:
        The path of the page.
    """
    folder = check_out(out)
    if gallery < 0:
        raise InputError(f"--gallery is {gallery}, it must be a number of latents, or 0 for no page")
    plan = load_suite(find_recipe(suite), root, host)
    if heads:
        if odd := [h for h in heads if h not in plan.heads]:
            raise InputError(f"{suite} has no head {odd[0]}, it has {', '.join(plan.heads)}")
        plan = _only(plan, heads)
    else:
        check_files(plan)
    if progress:
        images = "at most 1,500 images a set" if quick else "all images that the suite asks for"
        what = f"{len(plan.heads)} heads" if len(plan.heads) > 1 else "one head"
        print(f"mmsae evaluate: {what} on {', '.join(plan.data)}, {images}; to {folder}", flush=True)
    trained = SAE.from_pretrained(sae) if isinstance(sae, str) else sae
    model, loaded = load_pair(trained, plan.host, device, precision, allow_other_site)
    warnings = other_host_warnings(trained, loaded)
    if gallery:
        check_host(loaded)
    data = Data(plan, model, loaded, quick, batch_size, seed, progress, cache)
    start = time.perf_counter()
    found, skipped, seconds = run_suite(data, progress)
    about: dict[str, Any] = {
        "sae": str(sae), "host": loaded.hint, "site": {m: str(s) for m, s in model.sites.items()}, "suite": plan.path,
        "root": plan.root, "title": plan.title or Path(plan.path).stem, "d_sae": model.d_sae, "seed": seed,
        "quick": quick,
        "images": {n: data.features(n).n for n in plan.data if data.loaded(n)},
        "skipped": skipped, "seconds": seconds, "notes": {k: list(f.notes) for k, f in found.items()},
        "more": {k: f.more for k, f in found.items()},
    }  # fmt: skip
    about["warnings"] = [
        *warnings,
        *data.warnings,
        *overlaps(data),
        *(f"{k}: {w}" for k, f in found.items() for w in f.warnings),
    ]
    if any(token_site(s) for s in model.sites.values()):
        about["notes"]["core"] = [*about["notes"].get("core", ()), TOKENS]
    rows = [r for f in found.values() for r in f.rows]
    remove_leftovers(folder)
    with atomic_folder(folder) as temp:
        write_results(temp, rows, about)
        (temp / TABLES).write_text(markdown(rows), encoding="utf-8")
        write_card(temp / PAGE, rows, about)
        if gallery:
            write_top_gallery(temp / GALLERY, data, gallery)
    if progress:
        for warning in about["warnings"]:
            print(f"warning: {warning}")
        shown = [[r["head"], r["set"], r["score"], r["features"], r["control"] or "", r["value"], r["n"]] for r in rows]
        print(text_table(_headline(shown), ("head", "set", "score", "features", "control", "value", "n")))
        print(f"{len(rows)} figures in {time.perf_counter() - start:.0f} s: {folder / RESULTS}")
    return str(folder / PAGE)


def _headline(rows: Sequence[Sequence[Any]], most: int = 3) -> list[Sequence[Any]]:
    """A few rows of every head: the first scores of the code and its control."""
    out: list[Sequence[Any]] = []
    for name in dict.fromkeys(r[0] for r in rows):
        own = [r for r in rows if r[0] == name]
        scores = list(dict.fromkeys((r[1], r[2]) for r in own))[:most]
        out += [r for r in own if (r[1], r[2]) in scores and r[4] in ("", "random")]
    return out


def _only(suite: Suite, heads: Sequence[str]) -> Suite:
    from dataclasses import replace

    return replace(suite, heads={h: suite.heads[h] for h in heads})


def read_card(folder: str | Path) -> dict[str, Any]:
    """``results.json`` of an evaluation."""
    return json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))

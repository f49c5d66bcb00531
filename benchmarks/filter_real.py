"""Finding damaged pairs in real pictures: CIFAR-10 and Tiny-ImageNet with swapped captions, NLVR by its own labels.

    python benchmarks/filter_real.py --out runs/filter_real
    python benchmarks/filter_real.py --out runs/filter_real --only cifar10-held nlvr

Of each set two cases: ``held``, a host and SAEs trained on clean pairs filter other pairs, of which 30 % have the
caption of another class; ``own``, host and SAEs are trained on such damaged pairs and filter them. NLVR is trained on
the true sentences of half of its groups and filters the other half. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mmsae.activations import extract
from mmsae.cli import main as mmsae
from mmsae.files import atomic_file
from mmsae.filtering.truth import damage_auroc
from mmsae.options import call
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE, random_control
from mmsae.shards import FaultLog, Sample, ShardWriter, draw, expand, read_shard
from mmsae.world.models.command import pretrain_clip

DATA = Path("../shared/data")
SHARE, SEED, KEEP = 0.3, 0, 0.7
SCORES = ("clip", "clip_centred", "pair_code", "pair_weighted", "pair_calibrated")
Raw = tuple[str, dict[str, Any]]


class Case(NamedTuple):
    """One row group of the table.

    Attributes:
        train: Shards of the host, before any damage.
        test: Shards to filter, before any damage; empty: those of training, damaged.
        d_sae: Latents.
        k: Active latents.
        steps: Of the host and of the SAEs.
        clean: Whether host and SAEs are trained on clean pairs, which then also serve for calibration.
    """

    train: str
    test: str
    d_sae: int
    k: int
    steps: tuple[int, int]
    clean: bool = True


CIFAR, TINY = str(DATA / "cifar10/cifar10-"), str(DATA / "tiny_imagenet/tiny_imagenet-")
NLVR = str(DATA / "nlvr/nlvr-dev-*.tar.gz")
CIFAR_TRAIN = CIFAR + "train-{000000..000017}.tar.gz"  # as in benchmarks/real_input.py: the same host
CASES = {
    "cifar10-held": Case(CIFAR_TRAIN, CIFAR + "test-*.tar.gz", 48, 4, (800, 1000)),
    "cifar10-own": Case(CIFAR_TRAIN, "", 48, 4, (300, 1000), clean=False),
    "tiny_imagenet-held": Case(TINY + "train-*.tar.gz", TINY + "val-*.tar.gz", 256, 8, (300, 1000)),
    "tiny_imagenet-own": Case(TINY + "train-*.tar.gz", "", 256, 8, (300, 1000), clean=False),
    "nlvr": Case(NLVR, NLVR, 48, 4, (400, 500)),
}


def swapped(samples: Sequence[Sample]) -> Iterator[Raw]:
    """All samples, 30 % of them with the caption of a sample of another class; json says which."""
    rng = np.random.default_rng(SEED)
    wrong = np.zeros(len(samples), dtype=bool)
    wrong[rng.permutation(len(samples))[: round(SHARE * len(samples))]] = True
    for s, bad in zip(samples, wrong.tolist(), strict=True):
        donor = s
        while bad and donor.cls == s.cls:
            donor = samples[rng.integers(len(samples))]
        said = {"damaged": bad, "says": donor.meta["class"], "shows": s.meta["class"]}
        image = next(k for k in ("jpg", "png") if k in s.raw)
        yield s.key, {image: s.raw[image], "txt": donor.caption, "json": {"uid": s.uid, **said}}


def sentences(samples: Sequence[Sample], half: int) -> Iterator[Raw]:
    """NLVR by groups of one sentence: true pairs of one half, or all of the other, squashed to squares.

    The host's transform would keep the middle box of three.
    """
    for s in samples:
        if (draw(s.meta["identifier"].split("-")[0]) < 0.5) == (half == 0) and (half or s.cls == 1):
            png = io.BytesIO()
            Image.open(io.BytesIO(s.raw["png"])).convert("RGB").resize((64, 64)).save(png, "PNG")
            yield s.key, {"png": png.getvalue(), "txt": s.caption, "json": {"uid": s.uid, "damaged": s.cls == 0}}


def write(paths: str, out: Path, change: Callable[[list[Sample]], Iterator[Raw]]) -> str:
    """Shards of changed samples, unless they are there."""
    if not out.exists():
        samples = [s for p in expand(paths) for s in read_shard(p, FaultLog(), decode=False)]
        with ShardWriter(out, out.name) as writer:
            for key, fields in change(samples):
                writer.write(key, fields)
    return str(out)


def fit(recipe: str, case: Case, store: Path, run: Path) -> None:
    """``mmsae fit`` of a recipe, unless its SAE is there."""
    sae = "--model.sae.init_args."
    args = ["fit", "-c", f"configs/train/{recipe}_store.yaml", "--data.store", str(store)]
    args += ["--trainer.default_root_dir", str(run), f"{sae}ratio", "null", f"{sae}d_sae", str(case.d_sae)]
    args += [f"{sae}selector.init_args.k", str(case.k), "--model.optimizer.init_args.lr", "5e-3"]
    args += ["--trainer.max_steps", str(case.steps[1]), "--trainer.val_check_interval", str(case.steps[1])]
    args += ["--data.init_args.batch_size", "256", "--trainer.enable_progress_bar", "false"]
    if recipe == "vl_sae":
        args += [a for part in ("unit_in", "centre", "unit_out") for a in (f"{sae}normaliser.init_args.{part}", "true")]
    # an epoch of a small set has fewer steps than a validation interval
    args += ["--trainer.check_val_every_n_epoch", "null"]
    if not (run / "sae").exists():
        mmsae(args)


def reasons(table: Path, said: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How often the words that call the concepts of one side name what the text says and the image shows."""
    rows = [r for r in pq.read_table(table).to_pylist() if said[r["uid"]]["damaged"]]
    if "says" not in said[rows[0]["uid"]]:
        return {}

    def named(side: str, what: str) -> float:
        hits = [said[r["uid"]][what].split()[-1].lower() in " ".join(r[side]).lower().split() for r in rows]
        return sum(hits) / len(hits)

    return {
        "text names what it says": named("text_only", "says"),
        "image names what it shows": named("image_only", "shows"),
    }


def left(table: Path, damaged: set[str]) -> dict[str, float]:
    """Share of damaged pairs among the best 70 % by each score."""
    t = pq.read_table(table)
    bad = np.array([u in damaged for u in t["uid"].to_pylist()])
    n = round(KEEP * len(bad))
    columns = [c for c in SCORES if c in t.column_names]
    return {c: float(bad[np.argsort(-t[c].to_numpy(), kind="stable")[:n]].mean()) for c in columns}


def run_case(name: str, case: Case, out: Path) -> dict[str, Any]:
    """All figures of one case."""
    if name == "nlvr":
        train = write(case.train, out / "train", lambda s: sentences(s, 0))
        test = write(case.test, out / "test", lambda s: sentences(s, 1))
    else:
        test = write(case.test or case.train, out / "damaged", swapped)
        train = case.train if case.clean else test
    if not (out / "clip").exists():
        call(pretrain_clip, shards=train, out=str(out / "clip"), steps=case.steps[0], seed=SEED)
    store = extract(f"local-dir:{out / 'clip'}", train, out / "store", workers=0)
    said = {s.uid: s.meta for p in expand(test) for s in read_shard(p, FaultLog(), decode=False)}
    damaged = {u for u, m in said.items() if m["damaged"]}
    figures: dict[str, Any] = {"pairs": len(said), "damaged": len(damaged), "sae": {}}
    for method in ("paired_topk", "vl_sae", "random"):
        sae = out / method / "sae"
        if method == "random":
            if not sae.exists():
                control = random_control(SAE.from_pretrained(out / "paired_topk" / "sae"), SEED)
                control.save_pretrained(sae)
        else:
            fit(method, case, store, out / method)
        args = [
            "filter",
            "--sae",
            str(sae),
            "--host",
            f"local-dir:{out / 'clip'}",
            "--shards",
            test,
            "--keep",
            str(KEEP),
        ]
        args += ["--out", str(out / f"filter_{method}"), "--workers", "0"]
        mmsae(args + (["--calibration", train] if case.clean else []))
        table = out / f"filter_{method}" / "scores.parquet"
        figures["sae"][method] = {
            "auroc": damage_auroc(table, damaged),
            "damaged_left": left(table, damaged),
            "reasons": reasons(table, said),
        }
    return figures


def markdown(results: dict[str, Any]) -> str:
    """The table of ``docs/results/filtering.md``."""
    head = ["set", "SAE", *(f"`{c}`" for c in SCORES), "reasons (text / image)"]
    rows = []
    for name, case in results.items():
        for method, f in case["sae"].items():
            cells = [f"{f['auroc'][c]:.3f}" if c in f["auroc"] else "" for c in SCORES]
            why = " / ".join(f"{v:.2f}" for v in f["reasons"].values())
            rows.append([name, method, *cells, why])
    return markdown_table(head, rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/filter_real"))
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in args.only:
        results[name] = run_case(name, CASES[name], args.out / name)
        with atomic_file(file) as temp:
            temp.write_text(json.dumps(results, indent=1))
        (args.out / "table.md").write_text(markdown(results))
        print(markdown(results), file=sys.stderr)


if __name__ == "__main__":
    main()

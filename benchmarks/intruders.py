"""Which setting of an SAE keeps its weak activations meaningful: intruders by true concepts, for many settings.

    mmsae bench names --out runs/bench_names --clip runs/demo/clip --seeds 1 5
    python benchmarks/intruders.py --bench runs/bench_names --seeds 1 5 --out runs/intruders

Every setting is trained on the benchmark's own stores and codes its own items, by the recipe of its SAEs but for what
the setting says. *Clear* are latents whose F1 with a concept is .8 or more. Beside each is an SAE of random weights
with the same selector. Controls are the benchmark's own SAE with k 8, and random weights, on activations of which each
feature is permuted over the items by itself, and the 8 largest of 128 random directions of whitened activations. Names
are not looked at: `mmsae bench names` does that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmsae.activations import ActivationStore
from mmsae.bench.names.measure import CLEAR, TENTHS, by_concepts, intruders, meaning
from mmsae.bench.names.run import WORLD
from mmsae.demo.stages import fit_method
from mmsae.files import write_json
from mmsae.interpret.evidence.folder import Evidence
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE, random_control, to_jumprelu
from mmsae.types import IMAGE
from mmsae.world.generator.data import generate

LEAST = 20  # items on which a latent fires, to be looked at


class Setting(NamedTuple):
    """How an SAE is trained and read."""

    selector: tuple[str, dict[str, Any]] = ("TopK", {"k": 8})
    steps: int = 800
    d_sae: int = 128
    threshold: bool = False  # read by a threshold, see to_jumprelu
    floor: float = 0.0  # values below this share of a latent's largest in the train half count as silence

    @property
    def trained(self) -> str:
        """A folder's name for what was trained."""
        kind, args = self.selector
        return f"{kind}_{args.get('k', args.get('target'))}_{self.steps}_{self.d_sae}"

    @property
    def arguments(self) -> list[str]:
        """Arguments of ``mmsae fit``."""
        kind, args = self.selector
        losses = []
        if kind == "JumpReLU":
            sparse = {"class_path": "mmsae.sae.L0", "init_args": {"coefficient": 0.1, "target": args["target"]}}
            pair = {"class_path": "mmsae.sae.CodeCosine", "init_args": {"coefficient": 0.1}}
            losses = ["--model.losses", json.dumps([{"class_path": "mmsae.sae.Reconstruction"}, sparse, pair])]
            args = {"threshold": 0.03, "bandwidth": 0.03}
        chosen = json.dumps({"class_path": f"mmsae.sae.{kind}", "init_args": args})
        init = "--model.sae.init_args"
        return [f"{init}.selector", chosen, f"{init}.d_sae", str(self.d_sae), *losses]


def _top(k: int) -> tuple[str, dict[str, Any]]:
    return "TopK", {"k": k}


def _batch(k: int) -> tuple[str, dict[str, Any]]:
    return "BatchTopK", {"k": k}


SETTINGS = {
    "TopK, k 8": Setting(), "the same by a threshold": Setting(threshold=True),
    "k 7": Setting(_top(7)), "k 6": Setting(_top(6)), "k 4": Setting(_top(4)),
    "256 latents": Setting(d_sae=256), "3,200 steps": Setting(steps=3200),
    "3,200 steps, by a threshold": Setting(steps=3200, threshold=True),
    "BatchTopK, k 8": Setting(_batch(8)), "k 8, 1,600 steps": Setting(_batch(8), 1600),
    "BatchTopK, k 7": Setting(_batch(7)), "k 7, 1,600 steps": Setting(_batch(7), 1600),
    "BatchTopK, k 6": Setting(_batch(6)), "k 6, 1,600 steps": Setting(_batch(6), 1600),
    "JumpReLU, L0 of 8 asked": Setting(("JumpReLU", {"target": 8})),
    "L0 of 6 asked": Setting(("JumpReLU", {"target": 6})),
    "TopK, k 8, values above .01 of the largest": Setting(floor=0.01), ".1": Setting(floor=0.1),
    ".2": Setting(floor=0.2), ".3": Setting(floor=0.3),
}  # fmt: skip


class Coded:
    """What :func:`intruders` and :func:`meaning` read of evidence, of codes ``(n, d_sae)``."""

    def __init__(self, ev: Evidence, z: np.ndarray) -> None:
        self.items, self.n, self.z = ev.items, ev.n, z

    def codes(self, modality: str) -> Any:
        return SimpleNamespace(matrix=lambda: SimpleNamespace(toarray=lambda: self.z))

    def lists(self, modality: str) -> Any:
        return SimpleNamespace(row=lambda j: (np.flatnonzero(self.z[:, j]), self.z[self.z[:, j] != 0, j]))

    def live(self) -> list[int]:
        """Latents that fire on enough items that are no copies."""
        return np.flatnonzero((self.z[self.items.copy_of < 0] != 0).sum(0) >= LEAST).tolist()


def dense(sae: SAE, x: np.ndarray) -> np.ndarray:
    """``(n, d_sae)`` codes of rows."""
    with torch.no_grad():
        return sae.eval().encode(x, IMAGE).to_dense().numpy()


def coded(sae: SAE, rows: dict[str, Tensor], ev: Evidence, setting: Setting) -> Coded:
    """The benchmark's items, whose embeddings are what its SAEs read, coded as a setting has it."""
    sae = to_jumprelu(sae, rows) if setting.threshold else sae
    z = dense(sae, np.array(ev.embeddings(IMAGE)))
    z[z < setting.floor * z[ev.items.half == "train"].max(0)] = 0
    return Coded(ev, z)


def whitened(x: np.ndarray, rng: np.random.Generator, d_sae: int = 128, k: int = 8) -> np.ndarray:
    """``(n, d_sae)``: the k largest projections of each whitened row onto random directions."""
    u, size, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    u = u[:, size > 1e-3 * size[0]]
    z = (u @ rng.normal(size=(u.shape[1], d_sae))).astype(np.float32)
    return np.where(z >= np.sort(z, 1)[:, [-k]], z.clip(0), 0)


def controls(bench: Path, seed: int) -> dict[str, list]:
    """Sets ``(L, 10)`` of latents that should mean nothing, by name."""
    home, rng = bench / f"seed_{seed}", np.random.default_rng(seed)
    ev = Evidence(home / "evidence_sae")
    truth, sae, x = truth_of(ev, seed), SAE.from_pretrained(home / "fit" / "sae"), np.array(ev.embeddings(IMAGE))
    mixed = rng.permuted(x, axis=0)
    codes = {
        "the SAE on permuted features": dense(sae, mixed),
        "random weights on permuted features": dense(random_control(sae, seed), mixed),
        "random directions of whitened activations": whitened(x, rng),
    }
    own = {name: Coded(ev, z) for name, z in codes.items()}
    return {n: intruders(c, c.live(), by_concepts(truth), seed=seed).tolist() for n, c in own.items()}


def truth_of(ev: Evidence, seed: int) -> np.ndarray:
    """``(n, 26) bool`` which concepts the benchmark's items show."""
    world = generate(ev.n, WORLD + 2 + 2 * seed)
    at = {u: i for i, u in enumerate(world.uids)}
    return world.concepts[[at[u] for u in ev.items.uid]]


def measure(setting: Setting, bench: Path, seed: int, out: Path) -> dict[str, Any]:
    """Figures of one SAE and its control."""
    home, fit = bench / f"seed_{seed}", out / "fits" / f"{setting.trained}_{seed}"
    ev, store = Evidence(home / "evidence_sae"), ActivationStore(home / "store")
    truth = truth_of(ev, seed)
    if not (fit / "sae").exists():
        fit_method("paired_topk", home / "store", fit, setting.steps, seed, False, setting.arguments)
    sae = SAE.from_pretrained(fit / "sae")
    rows = {m: store.load(modality=m) for m in sae.modalities}
    own, random = (coded(s, rows, ev, setting) for s in (sae, random_control(sae, seed, rows)))
    real, live, judge = meaning(own, truth), own.live(), by_concepts(truth)
    clear = [j for j in live if real.f1[:, j].max() >= CLEAR]
    found = intruders(own, clear, judge, seed=seed), intruders(random, random.live(), judge, seed=seed)
    counts = {"live": len(live), "clear": len(clear), "concepts": int((real.f1[:, live].max(1) >= CLEAR).sum())}
    l0 = {"l0": float((own.z != 0).sum(1).mean()), "random l0": float((random.z != 0).sum(1).mean())}
    return counts | l0 | {"sets": found[0].tolist(), "random sets": found[1].tolist()}


def mean(tables: Sequence[Sequence[Sequence[float]]], tenths: int = TENTHS) -> str:
    """The mean over the latents of tables ``(L, 10)``, of the first tenths of their values."""
    each = np.concatenate([np.array(t, float).reshape(-1, TENTHS)[:, :tenths] for t in tables])
    return f"{np.nanmean(each[~np.isnan(each).all(1)], 1).mean():.3f}"


def row(name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """One setting's row of the table; the means of latents of all seeds."""
    counts = [" + ".join(str(r[k]) for r in runs) for k in ("live", "clear", "concepts")]
    l0 = [f"{np.mean([r[k] for r in runs]):.1f}" for k in ("l0", "random l0")]
    own, random = ([r[k] for r in runs] for k in ("sets", "random sets"))
    return [name, l0[0], *counts, mean(own, TENTHS // 2), mean(own), mean(random), l0[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, help="folder of mmsae bench names")
    parser.add_argument("--out", default="runs/intruders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    out, found = Path(args.out), {}
    out.mkdir(parents=True, exist_ok=True)
    for name in args.settings:
        found[name] = [measure(SETTINGS[name], Path(args.bench), seed, out) for seed in args.seeds]
        print(" | ".join(row(name, found[name])), flush=True)
    head = ["setting", "L0", "latents", "clear", "concepts with one", "strong items", "items of all strengths",
            "random weights", "their L0"]  # fmt: skip
    dead = [controls(Path(args.bench), seed) for seed in args.seeds]
    rows = [[n, mean([d[n] for d in dead], TENTHS // 2), mean([d[n] for d in dead])] for n in dead[0]]
    write_json(out / "intruders.json", {"settings": found, "controls": dead})
    tables = (
        markdown_table(head, [row(n, r) for n, r in found.items()]),
        markdown_table(["control", *head[5:7]], rows),
    )
    (out / "table.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

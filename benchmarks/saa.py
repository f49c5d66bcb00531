"""Whether an SAE gains from seeing less of what it reconstructs well: the loss-history sampler against uniform draws.

    python benchmarks/saa.py --store runs/demo/store --out runs/saa

The sampler is that of SAA (arXiv 2309.03598) as an SAE's training would have it (reconstructed): every item keeps an
exponential average of its share of unexplained variance; when all have been seen often enough, Otsu's rule cuts the
logarithms in two; items below the cut ("naive") are drawn less often. It cuts nothing where the two classes explain
less than half of the variance. Arms have equal steps, batches, weights at the start and seeds:

- uniform: the control
- sampled .3, sampled .1: naive items are drawn with .3 or .1 of the others' chance
- shuffled .3: as many items are drawn less often, but any, which tells the history from mere oversampling
- low half .3 (on request): the half of the items with the lower history, whatever the variance says
- weighted (on request): as sampled .3, with importance weights, so that the expected gradient is that of uniform draws

It is done on the generated world's pairs as they are, and on a long tail in which four of its concepts are kept in 3 %
of their items. Scores are of the whole held-out split, drawn uniformly: FVU, the share of latents that never fire, and
the F1 of concepts and of the rare ones, with latents and thresholds that are chosen on the whole training split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsae.activations import ActivationStore
from mmsae.files import write_json
from mmsae.metrics import concept_report, fvu
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE, AuxK, CodeCosine, Dictionary, Normaliser, Reconstruction, TopK
from mmsae.sae.losses import LossTerm
from mmsae.training.plain import train
from mmsae.world.generator.captions import mentions
from mmsae.world.generator.scene import CONCEPT_GROUPS, CONCEPTS

RARE = ("purple", "cyan", "cross", "ring")
ARMS = {  # name: (chance of naive items, what is naive)
    "uniform": (1.0, "otsu"),
    "sampled .3": (0.3, "otsu"),
    "sampled .1": (0.1, "otsu"),
    "shuffled .3": (0.3, "shuffled"),
    "low half .3": (0.3, "half"),
    "weighted": (0.3, "weighted"),
}
MOMENTUM, VISITS, SEPARABLE = 0.9, 2, 0.5


def otsu(values: np.ndarray) -> tuple[float, float]:
    """The cut with the largest variance between the two classes, and its share of the whole variance.

    Values below the cut are the lower class. Nothing is cut, and the share is 0, where all values are equal.
    """
    x = np.sort(np.asarray(values, np.float64))
    n = len(x)
    whole = x.var()
    if n < 2 or whole <= 1e-24 * max(1.0, x[-1] ** 2):
        return -np.inf, 0.0
    left = np.arange(1, n)
    total = np.cumsum(x)[:-1]
    low, high = total / left, (x.sum() - total) / (n - left)
    between = left * (n - left) / n**2 * (high - low) ** 2
    between[x[1:] == x[:-1]] = -1  # equal values are of one class
    best = int(between.argmax())
    return float((x[best] + x[best + 1]) / 2), float(between[best] / whole)


class LossHistory(LossTerm):
    """Watches the training: each item's averaged share of unexplained variance, and how often it was seen.

    As a loss term it sees the outputs of every step and adds nothing, or, with importance weights, replaces the
    reconstruction by the weighted one.
    """

    name = "history"

    def __init__(self, n: int, weighted: bool = False):
        super().__init__()
        self.value, self.visits = np.full(n, np.nan), np.zeros(n, int)
        self.rows, self.weights, self.weighted = np.zeros(0, int), torch.ones(0), weighted

    def forward(self, outputs: Any, ctx: Any) -> Tensor:
        off = torch.stack([((o.recon - o.target) ** 2).sum(1) for o in outputs.values()]).sum(0)
        size = torch.stack([(o.target**2).sum(1) for o in outputs.values()]).sum(0)  # the mean is removed already
        share = (off / size.clamp(min=1e-12)).detach().numpy()
        rows, at = np.unique(self.rows, return_index=True)
        old = self.value[rows]
        self.value[rows] = np.where(np.isnan(old), share[at], MOMENTUM * old + (1 - MOMENTUM) * share[at])
        self.visits[rows] += 1
        if not self.weighted:
            return off.new_zeros(())
        terms = [((o.recon - o.target) ** 2).sum(1) / (o.target**2).sum(1).mean() for o in outputs.values()]
        return torch.stack([(t * (self.weights - 1)).mean() for t in terms]).sum()


def naive(history: LossHistory, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """``(n,) bool`` which items are naive, and how separable the two classes are."""
    value = np.log(np.where(np.isnan(history.value), np.nanmean(history.value), history.value).clip(1e-12))
    cut, share = otsu(value)
    if kind in ("otsu", "weighted"):
        return (value < cut) & (share >= SEPARABLE), share
    if kind == "shuffled":
        return rng.permutation((value < cut) & (share >= SEPARABLE)), share
    return value < np.median(value), share


class Draws(Iterator):
    """Batches of rows; the chances are computed anew after every pass's worth of them."""

    def __init__(self, x: dict[str, Tensor], history: LossHistory, arm: str, batch: int, seed: int):
        self.x, self.history, self.batch = x, history, batch
        self.chance, self.kind = ARMS[arm]
        self.n = len(next(iter(x.values())))
        self.rng, self.step = np.random.default_rng(seed), 0
        self.p = np.full(self.n, 1 / self.n)
        self.marked: list[float] = []
        self.separable: list[float] = []

    def __next__(self) -> dict[str, Tensor]:
        if self.step and self.step % -(-self.n // self.batch) == 0 and self.history.visits.mean() >= VISITS:
            some, share = naive(self.history, self.kind, self.rng)
            p = np.where(some, self.chance, 1.0)
            self.p = p / p.sum()
            self.marked.append(float(some.mean()))
            self.separable.append(share)
        self.step += 1
        rows = self.rng.choice(self.n, self.batch, p=self.p)
        self.history.rows = rows
        self.history.weights = torch.from_numpy(1 / (self.n * self.p[rows])).float()
        return {m: v[rows] for m, v in self.x.items()}


def load(folder: Path) -> tuple[dict[str, Tensor], np.ndarray]:
    """Rows by modality, and the concepts that each pair shows."""
    store = ActivationStore(folder)
    return {m: store.load(modality=m).float() for m in ("image", "text")}, mentions(store.captions)


def long_tail(truth: np.ndarray, seed: int, share: float = 0.03) -> np.ndarray:
    """Rows of a training split in which items with one of the rare concepts are kept in so few cases."""
    rare = truth[:, [CONCEPTS.index(c) for c in RARE]].any(1)
    return np.flatnonzero(~rare | (np.random.default_rng([seed, 9]).random(len(truth)) < share))


@torch.no_grad()
def scores(sae: SAE, train_data: Any, test_data: Any) -> dict[str, float]:
    """Figures on the held-out split."""
    (x, truth), (xt, truth_t) = train_data, test_data
    codes = [{m: sae.encode(v, modality=m) for m, v in data.items()} for data in (x, xt)]
    groups = [g for g, names in CONCEPT_GROUPS.items() for _ in names]
    truths = [torch.from_numpy(t) for t in (truth, truth_t)]
    report = concept_report(codes[0], truths[0], codes[1], truths[1], CONCEPTS, groups)
    out = {"F1": report["concept_f1"]["image"], "F1 text": report["concept_f1"]["text"]}
    for side, name in (("image", "rare F1"), ("text", "rare F1 text")):
        out[name] = float(np.mean([c["f1"][side] for c in report["concepts"] if c["name"] in RARE]))
    for m, v in xt.items():
        out[f"FVU {m}"] = float(fvu(sae.decode(codes[1][m], modality=m), v))
        rare = torch.from_numpy(truth_t[:, [CONCEPTS.index(c) for c in RARE]].any(1))
        hat = sae.decode(codes[1][m], modality=m)
        out[f"rare FVU {m}"] = float(((hat - v)[rare] ** 2).sum() / ((v - v.mean(0))[rare] ** 2).sum())
    fired = torch.stack([(c.to_dense() != 0).any(0) for c in codes[1].values()]).any(0)
    return out | {"dead": float(1 - fired.float().mean())}


def one(arm: str, x: dict[str, Tensor], seed: int, args: argparse.Namespace) -> tuple[SAE, Draws]:
    """One training."""
    torch.manual_seed(seed)
    sae = SAE({m: v.shape[1] for m, v in x.items()}, d_sae=args.d_sae, selector=TopK(args.k),
              normaliser=Normaliser(unit_in=True, centre=True, unit_out=True),
              dictionaries={m: Dictionary() for m in x})  # fmt: skip
    sae.fit_normaliser(x)
    history = LossHistory(len(next(iter(x.values()))), weighted=ARMS[arm][1] == "weighted")
    draws = Draws(x, history, arm, args.batch_size, seed)
    losses = [Reconstruction(), AuxK(k_aux=16, dead_after=100_000), CodeCosine(0.1), history]
    train(sae, losses, draws, args.steps, lr=2e-3, seed=seed)
    return sae, draws


def summary(rows: Sequence[dict[str, float]], control: Sequence[dict[str, float]], key: str) -> str:
    """Mean over seeds, and the mean difference to the control on the same seeds with its 95% interval of t."""
    from scipy.stats import t

    own, other = (np.array([r[key] for r in some]) for some in (rows, control))
    d = own - other
    if not d.any():
        return f"{own.mean():.4f}"
    half = t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else np.nan
    return f"{own.mean():.4f} ({d.mean():+.4f} ± {half:.4f})"


def main(argv: Sequence[str] | None = None) -> Path:
    """Run all arms; returns the path of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder with the stores train and test of the world")
    parser.add_argument("--out", type=Path, default=Path("runs/saa"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:4], choices=list(ARMS))
    parser.add_argument("--corpora", nargs="+", default=["long tail", "as it is"], choices=["long tail", "as it is"])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=128)
    parser.add_argument("--k", type=int, default=8)
    args = parser.parse_args(argv)
    whole, test = load(args.store / "train"), load(args.store / "test")
    lines, results, start = [], {}, time.process_time()
    for corpus in args.corpora:
        found: dict[str, list[dict[str, float]]] = {a: [] for a in args.arms}
        for seed in args.seeds:
            rows = long_tail(whole[1], seed) if corpus == "long tail" else np.arange(len(whole[1]))
            x = {m: v[rows] for m, v in whole[0].items()}
            for arm in args.arms:
                sae, draws = one(arm, x, seed, args)
                own = scores(sae, whole, test)
                own["marked"] = float(np.mean(draws.marked or [0]))
                own["separable"] = float(np.mean(draws.separable or [np.nan]))
                found[arm].append(own)
            print(corpus, seed, f"{time.process_time() - start:.0f} s", flush=True)
        results[corpus] = found
        keys = [k for k in found["uniform"][0] if k not in ("marked", "separable")]
        shown = [
            [
                arm,
                *(summary(r, found["uniform"], k) for k in keys),
                *(f"{np.mean([v[k] for v in r]):.2f}" for k in ("marked", "separable")),
            ]
            for arm, r in found.items()
        ]
        lines += [f"### {corpus}", "", markdown_table(["arm", *keys, "naive share", "separability"], shown), ""]
    write_json(args.out / "saa.json", results)
    path = args.out / "saa.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    print(f"{time.process_time() - start:.0f} CPU-seconds: {path}")
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

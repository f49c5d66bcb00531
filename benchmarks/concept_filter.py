"""Removing a class from photographs by a query over concepts of a host without texts, three seeds.

    python benchmarks/concept_filter.py --data ../shared/data/clothing --out runs/real_concepts

Store and SAEs are those of ``real_concepts.py`` (``lite0``, 1,000 photographs of garments in ten classes). For every
class a query is made on these: the latent and percentile with the best F1, then up to two more that raise it. ``~`` of
that then cleans the 331 photographs of the other shard. The same is done with random weights, and with the host's raw
channels, each above and below its mean, in the latents' place; a linear probe that learned all ten classes from the
same labels stands beside them. Percentiles are those of the 1,000 photographs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from real_concepts import held_out, sae_of
from torch import Tensor

from mmsae.activations import ActivationStore
from mmsae.evaluation.images import HostPass, read_images
from mmsae.evaluation.labels import read_labels
from mmsae.files import write_json
from mmsae.metrics.concepts.query import evaluate, percentiles
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE, random_control
from mmsae.types import IMAGE

GRID = tuple(round(0.1 * i, 1) for i in range(10))  # percentiles from which a concept counts
MOST = 3  # concepts of a query


class Values(NamedTuple):
    """Values of F features in n images, 0 where one is silent; a query reads them as it reads codes."""

    dense: np.ndarray  #: ``(n, F)``

    @property
    def n(self) -> int:
        """Number of features."""
        return self.dense.shape[1]

    @property
    def width(self) -> int:
        """Number of images."""
        return len(self.dense)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Images on which a feature fires, and its values there."""
        at = np.flatnonzero(self.dense[:, i])
        return at, self.dense[at, i]

    def scores(self) -> np.ndarray:
        """``(n, F)`` percentiles of the values among those of the images on which a feature fires, else 0."""
        out = np.zeros_like(self.dense)
        for j in range(self.n):
            at, values = self.row(j)
            out[at, j] = percentiles(values)
        return out


def f1(said: np.ndarray, true: np.ndarray) -> np.ndarray:
    """F1 of columns ``said (n, F)`` with ``true (n,)``."""
    hit = (said & true[:, None]).sum(0)
    return 2 * hit / np.maximum(said.sum(0) + true.sum(), 1)


def query_of(values: Values, true: np.ndarray) -> str:
    """The query with the best F1 for a class on some images, by greedy choice of up to :data:`MOST` concepts."""
    scores = values.scores()
    chosen, have, best = [], np.zeros(values.width, bool), 0.0
    for _ in range(MOST):
        found = [f1((scores > t) | have[:, None], true) for t in GRID]
        t, j = np.unravel_index(int(np.argmax(found)), np.shape(found))
        if found[t][j] <= best + 1e-9:
            break
        best, have = found[t][j], have | (scores[:, j] > GRID[t])
        chosen.append(f"(#{j} > {GRID[t]})" if GRID[t] else f"#{j}")
    return " | ".join(chosen)


def pooled(x: Tensor, item: Tensor, n: int, codes: Callable[[Tensor], Tensor]) -> Values:
    """The largest value of each feature over the places of each image."""
    out = [codes(x[item == i]).amax(0) for i in range(n)]
    return Values(torch.stack(out).clamp(min=0).numpy())


def channels(x: Tensor) -> Tensor:
    """Raw channels ``(N, 2 d)``, each above and below the mean of the rows that :func:`main` took off."""
    return torch.cat([x, -x], 1).clamp(min=0)


def coder(sae: SAE) -> Callable[[Tensor], Tensor]:
    """Dense codes of rows."""

    @torch.no_grad()
    def codes(x: Tensor) -> Tensor:
        return sae.encode(x, IMAGE).to_dense()

    return codes


def cleaned(removed: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    """How well what was removed is what was planted."""
    hit = float((removed & planted).sum())
    precision, recall = hit / max(removed.sum(), 1), hit / planted.sum()
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / max(precision + recall, 1e-12)}


def probe(train: Values, labels: np.ndarray, test: Values) -> np.ndarray:
    """``(n,)`` classes that a logistic regression on standardised features gives, with L2 chosen by 5 folds."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=(1e-4, 1e-3, 1e-2), cv=5, max_iter=300))
    return model.fit(train.dense, labels).predict(test.dense)


def rows_of(data: Path, out: Path, host: str) -> dict[str, tuple[Tensor, Tensor, np.ndarray]]:
    """``{set: (rows, item, class of each image)}`` of the training store and of the held-out photographs."""
    store = ActivationStore(out / "store")
    x, item = store.load(modality=IMAGE).float(), torch.arange(len(store.uids)).repeat_interleave(49)
    known = read_labels([str(data / "clothing-000000.tar.gz")], "class_text").value
    found = {"train": (x, item, np.array([known[u] for u in store.uids]))}
    test = held_out(data, sae_of(data, out, host, 0), out, host, 0)
    paths = test.suite.paths("train")
    known = read_labels(paths, "class_text").value
    got = list(read_images(HostPass(test.host, test.sae.sites[IMAGE], run=test.run), paths, set(known)))
    uids = [u for g in got for u in g.uids]
    x = torch.cat([g.x for g in got])
    item = torch.arange(len(uids)).repeat_interleave(len(x) // len(uids))
    return found | {"test": (x, item, np.array([known[u] for u in uids]))}


def run(sets: dict[str, tuple[Tensor, Tensor, np.ndarray]], saes: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every class and kind of features."""
    (_, _, train_class), (_, _, test_class) = sets["train"], sets["test"]
    rows = []
    for kind, codes in saes.items():
        values = {name: pooled(x, item, len(own), codes) for name, (x, item, own) in sets.items()}
        by_probe = probe(values["train"], train_class, values["test"]) if kind == "raw channels" else None
        for name in sorted(set(train_class)):
            query = query_of(values["train"], train_class == name)
            same = {"calibration": {IMAGE: values["train"]}, "holds": True}
            keeps = evaluate(f"~({query})", {IMAGE: values["test"]}, **same)
            planted = test_class == name
            rows.append({"class": name, "features": kind, "query": f"~({query})", **cleaned(~keeps, planted)})
            if by_probe is not None:
                rows.append({"class": name, "features": "linear probe", **cleaned(by_probe == name, planted)})
            base = {"class": name, "features": "nothing removed", "share": float(planted.mean())}
            rows += [base] if kind == "raw channels" else []
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """Means over classes, with the range over seeds."""
    kinds = list(dict.fromkeys(r["features"] for r in results if "F1" in r))
    body = []
    for kind in kinds:
        cells = []
        for figure in ("precision", "recall", "F1"):
            own = [r for r in results if r["features"] == kind]
            means = [np.mean([r[figure] for r in own if r["seed"] == s]) for s in sorted({r["seed"] for r in own})]
            cells.append(f"{np.mean(means):.3f}" + (f" ({min(means):.3f}–{max(means):.3f})" if len(means) > 1 else ""))
        body.append([kind, *cells])
    return markdown_table(["removed by", "precision", "recall", "F1"], body)


def main(argv: Sequence[str] | None = None) -> Path:
    """Everything that is not done yet; returns the path of the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two shards")
    parser.add_argument("--out", type=Path, default=Path("runs/real_concepts"))
    parser.add_argument("--host", default="lite0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args(argv)
    paths = {seed: sae_of(args.data, args.out, args.host, seed) for seed in args.seeds}
    sets, results = rows_of(args.data, args.out, args.host), []
    mean = sets["train"][0].mean(0)
    for seed, path in paths.items():
        sae = SAE.from_pretrained(path)
        kinds = {"SAE": coder(sae), "random weights": coder(random_control(sae, seed))}
        if seed == args.seeds[0]:  # these do not depend on the seed
            kinds["raw channels"] = lambda x: channels(x - mean)
        results += [{"seed": seed, **r} for r in run(sets, kinds)]
    path = write_json(args.out / "concept_filter.json", {"rows": results}, indent=1)
    print(table(results))
    print(json.dumps([r for r in results if r["features"] == "SAE" and r["seed"] == args.seeds[0]], indent=1))
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

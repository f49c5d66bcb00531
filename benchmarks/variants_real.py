"""SAE variants on photographs: error against latents per row, dead latents, likeness and classes, three seeds.

    python benchmarks/variants_real.py --host FOLDER --data FOLDER --out runs/variants_real

*images*: the maps of the last blocks of an EfficientNet-Lite0 on Tiny-ImageNet, SAEs of one modality. They learn from
one training shard, learning rates are chosen on another, everything is scored on the validation shard.
*pairs*: CIFAR-10 images and captions seen by a CLIP that is trained here, SAEs over both modalities; the last tenth of
the training shards is for choosing. All SAEs of a part get equal rows, width, steps, normaliser and numbers of latents.
Choices are made with a seed that is not reported. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from real_input import prepare
from torch import Tensor
from torch.nn.functional import one_hot
from variants_real_table import write_report

from mmsae.activations import ActivationStore, extract
from mmsae.bench.multimodal.data import Split, class_prompts, load_split
from mmsae.bench.sized import CONTROLS, PAIR, SPARSITY, Size, fit, sae_recipes, scaled_terms
from mmsae.bench.stages import stages_of
from mmsae.bench.summary import over_seeds
from mmsae.evaluation.labels import Labels, read_labels
from mmsae.evaluation.pooling import pool_codes
from mmsae.evaluation.zeroshot.scores import accuracy, zero_shot_scores
from mmsae.files import write_json
from mmsae.hosts import Host, load_host
from mmsae.jobs.stages import Stages
from mmsae.metrics.concepts.monosemanticity import monosemanticity
from mmsae.metrics.concepts.probing import matrix, nearest_mean, predictions
from mmsae.metrics.reconstruction import fvu
from mmsae.sae import SAE
from mmsae.shards import expand
from mmsae.types import IMAGE, TEXT, Codes

SITE = "blocks.6:out[all]"
TUNING_SEED = 1000  #: Of the trainings by which learning rates and strengths are chosen; no figure of them is reported.
LRS = (3e-3, 1e-2, 3e-2)
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  #: Of the penalty of SAEs without k and target.
NEAR = 1.25  #: A number of latents per row is near k within this factor.
CHUNK = 8192  #: Rows encoded at a time.


class Part(NamedTuple):
    """What the SAEs of one part are, and how long they train."""

    variants: tuple[str, ...]  #: Recipes of ``configs/sae``.
    controlled: str  #: The one whose controls are shown, at the middle k.
    modalities: tuple[str, ...]
    d_sae: int
    ks: tuple[int, ...]
    steps: int
    rows: int  #: Rows of each modality a step.
    normaliser: dict[str, Any]  #: Of every SAE.


IMAGES = Part(
    ("topk", "batch_topk", "matryoshka", "jumprelu", "mp_sae", "abs_topk", "gated"),
    "topk", (IMAGE,), 512, (8, 16, 32), 200, 256, {"centre": True, "scale": "rms"},
)  # fmt: skip
PAIRS = Part(
    ("paired_topk", "vl_sae", "shared_topk", "batch_topk", "matryoshka", "jumprelu", "mp_sae"),
    "shared_topk", PAIR, 256, (4, 8, 16), 400, 256, {"unit_in": True, "centre": True, "unit_out": True},
)  # fmt: skip


class Data(Protocol):
    """Rows of one part; row i of each modality is a pair."""

    train: Mapping[str, Tensor]  #: ``{modality: (N, d)}`` raw activations.
    choose: Mapping[str, Tensor]  #: Others, by which everything is chosen.

    def score(self, sae: SAE) -> dict[str, float]:
        """Figures on rows that were kept from everything else."""


@torch.no_grad()
def through(sae: SAE, x: Tensor, modality: str) -> tuple[Codes, Tensor]:
    """Codes and reconstructions of rows ``(N, d)``."""
    parts = [sae.encode(rows, modality) for rows in x.split(CHUNK)]
    return Codes.stack(parts), torch.cat([sae.decode(z, modality) for z in parts])


def front(sae: SAE, x: Mapping[str, Tensor]) -> dict[str, float]:
    """``fvu``, ``l0`` and ``dead`` (the share of latents that no row of any modality makes fire).

    The first two are means over modalities, and ``fvu_MODALITY`` where there are several.
    """
    error, l0, dead = {}, [], torch.ones(sae.d_sae, dtype=torch.bool)
    for m, rows in x.items():
        z, recon = through(sae, rows, m)
        error[m] = fvu(recon, rows)
        l0.append(float(z.l0().double().mean()))
        dead &= ~fired(z)
    out = {"fvu": sum(error.values()) / len(error), "l0": sum(l0) / len(l0), "dead": float(dead.double().mean())}
    return out | ({f"fvu_{m}": v for m, v in error.items()} if len(error) > 1 else {})


def fired(z: Codes) -> Tensor:
    """``(F,)`` bool: which latents are on in some row."""
    on = z.values != 0
    if z.indices is None:
        return on.any(0)
    return torch.zeros(z.d_sae, dtype=torch.bool).index_fill_(0, z.indices[on], True)


def likeness(z: Codes, labels: Tensor) -> dict[str, float]:
    """Monosemanticity above chance of the latents that have one, and their share; the class is the judge."""
    found = monosemanticity(z, one_hot(labels).float()).summary()
    return {"ms": found["above_chance"], "ms_scored": found["scored"] / z.d_sae}


class Maps(NamedTuple):
    """Rows of the positions of n images."""

    x: Tensor  #: ``(N, d)``.
    item: Tensor  #: ``(N,)`` the image of each row, in order.
    labels: Tensor  #: ``(n,)`` classes.

    @classmethod
    def load(cls, store: Path, known: Labels, values: Sequence[Any], limit: int | None = None) -> Maps:
        """The first ``limit`` images of a store with one site."""
        held = ActivationStore(store)
        x = held.load(modality=IMAGE)
        item = torch.from_numpy(held.items_of_rows(IMAGE, np.arange(len(x))))
        maps = cls(x, item, known.numbers(held.uids, values))
        return maps if limit is None else maps.first(limit)

    def first(self, n: int) -> Maps:
        """The first n images."""
        keep = self.item < n
        return Maps(self.x[keep], self.item[keep], self.labels[:n])

    def codes(self, sae: SAE) -> tuple[Codes, Tensor]:
        """One row of codes an image, the largest of each latent over its positions, and the rows' reconstructions."""
        z, recon = through(sae, self.x, IMAGE)
        return pool_codes(z, self.item, len(self.labels))[0], recon


class Images:
    """Maps of photographs, and what the host makes of their reconstructions.

    Args:
        train: Of the images that SAEs learn from, and whose codes make class means.
        choose: Of images to choose on.
        test: Of images that are only scored.
        logits: ``(n, C)`` logits of the host for maps ``(N, d)``, in the order of the labels.
    """

    def __init__(self, train: Maps, choose: Maps, test: Maps, logits: Callable[[Maps], Tensor]) -> None:
        self.train, self.choose = {IMAGE: train.x}, {IMAGE: choose.x}
        self.fit, self.test, self.logits = train, test, logits
        self.classes = int(max(m.labels.max() for m in (train, test))) + 1
        self.said = logits(test).argmax(1)

    def host(self) -> dict[str, float]:
        """Accuracies of the host itself, and of class means of its maps' means."""
        means = [matrix(mean_of(m)) for m in (self.fit, self.test)]
        return {"host": self._right(self.said), "means": self._nearest(*means)}

    def _right(self, said: Tensor) -> float:
        return float((said == self.test.labels).double().mean())

    def _nearest(self, own: Any, held: Any) -> float:
        return self._right(predictions(nearest_mean(own, self.fit.labels.numpy(), self.classes), held))

    def score(self, sae: SAE) -> dict[str, float]:
        """The front on positions, the rest on images."""
        z, recon = self.test.codes(sae)
        said = self.logits(self.test._replace(x=recon)).argmax(1)
        return {
            **front(sae, {IMAGE: self.test.x}),
            **likeness(z, self.test.labels),
            "nearest": self._nearest(matrix(self.fit.codes(sae)[0]), matrix(z)),
            "host": self._right(said),
            "same": float((said == self.said).double().mean()),
        }


def mean_of(maps: Maps) -> Tensor:
    """``(n, d)`` mean of the rows of each image."""
    total = torch.zeros(len(maps.labels), maps.x.shape[1]).index_add_(0, maps.item, maps.x)
    return total / torch.bincount(maps.item)[:, None]


class Pairs:
    """Embeddings of images and captions of known classes."""

    def __init__(self, train: Split, val: Split, test: Split, prompts: Tensor) -> None:
        self.train, self.choose, self.test, self.prompts = train.x, val.x, test, prompts

    def host(self) -> dict[str, float]:
        """Zero-shot accuracy of the host."""
        image, text = (torch.nn.functional.normalize(x.double(), dim=1) for x in (self.test.x[IMAGE], self.prompts))
        return {"host": accuracy(image @ text.T, self.test.labels)}

    def score(self, sae: SAE) -> dict[str, float]:
        """The front of both modalities, likeness of the images' codes, zero-shot by codes and by reconstructions."""
        x, labels = self.test.x, self.test.labels
        scores = zero_shot_scores(sae, x[IMAGE], self.prompts)
        code = {m: likeness(through(sae, x[m], m)[0], labels) for m in (IMAGE, TEXT)}
        return {
            **front(sae, x),
            **code[IMAGE],
            "ms_text": code[TEXT]["ms"],
            **{f"zero_{kind}": accuracy(scores[kind], labels) for kind in ("code", "recon")},
        }


def images_of(args: Namespace) -> Images:
    """The maps of the host, with the labels of the shards."""
    tiny = args.data / "tiny_imagenet"
    shards = {"train": "train-000000", "choose": "train-000006"}
    shards = {split: [str(tiny / f"tiny_imagenet-{name}.tar.gz")] for split, name in shards.items()}
    shards |= {"test": expand(str(tiny / "tiny_imagenet-val-*.tar.gz"))}
    host = load_host(f"timm:local-dir:{args.host}")
    for split, paths in shards.items():
        out = args.out / "maps" / split
        extract(host, paths, out, sites=[SITE], dtype="float16", workers=0, batch_size=32, progress=False)
    values = read_labels(shards["test"], "wnid")
    values = values.values_of(list(values.value))
    limits = {"train": None, "choose": 350, "test": 100 if args.quick else None}
    maps = {
        split: Maps.load(args.out / "maps" / split, read_labels(paths, "wnid"), values, limits[split])
        for split, paths in shards.items()
    }
    return Images(maps["train"], maps["choose"], maps["test"], rest_of(host, values))


def rest_of(host: Host, wnids: Sequence[str]) -> Callable[[Maps], Tensor]:
    """The layers of an EfficientNet behind :data:`SITE`: logits of maps, for these of ImageNet's classes."""
    from timm.data import ImageNetInfo

    names = ImageNetInfo().label_names()
    columns = [names.index(w) for w in wnids]
    model = host.model

    @torch.no_grad()
    def logits(maps: Maps) -> Tensor:
        n = len(maps.labels)
        side = math.isqrt(len(maps.x) // n)
        x = maps.x.view(n, side, side, -1).permute(0, 3, 1, 2)
        parts = [model.forward_head(model.bn2(model.conv_head(some))) for some in x.split(64)]
        return torch.cat(parts)[:, columns]

    return logits


def pairs_of(args: Namespace) -> Pairs:
    """The embeddings of the CLIP of real_input.py, trained here unless it is there."""
    cifar, out = args.data / "cifar10", args.out / "pairs"
    out.mkdir(parents=True, exist_ok=True)
    train = str(cifar / ("cifar10-train-00000[0-1].tar.gz" if args.quick else "cifar10-train-*.tar.gz"))
    asked = Namespace(
        train=train, val=None, test=str(cifar / "cifar10-test-*.tar.gz"), out=out, host=None, image_size=32,
        clip_steps=20 if args.quick else 800, clip_seed=0, progress=False,
    )  # fmt: skip
    host, shards = prepare(asked)
    train, classes = load_split(out / "store" / "train", shards["train"])
    val, test = (load_split(out / "store" / s, shards[s], classes)[0] for s in ("val", "test"))
    return Pairs(train, val, test, class_prompts(host, train, len(classes)))


def chosen_lr(tried: Mapping[float, Mapping[str, float]], k: float) -> float:
    """The learning rate of the lowest FVU among those whose L0 is near k; of the nearest L0, if none is."""
    miss = {lr: abs(math.log(max(t["l0"], 1e-6) / k)) for lr, t in tried.items()}
    near = [lr for lr in tried if miss[lr] <= math.log(NEAR)]
    return min(near, key=lambda lr: tried[lr]["fvu"]) if near else min(tried, key=miss.__getitem__)


def chosen_strength(tried: Mapping[float, Mapping[str, float]], k: float) -> float:
    """The strength whose L0 is nearest to k, as a ratio."""
    return min(tried, key=lambda s: abs(math.log(max(tried[s]["l0"], 1e-6) / k)))


class Benchmark:
    """One part: choices, trainings and figures, each kept in a stage of its own."""

    def __init__(self, name: str, part: Part, data: Data, stages: Stages) -> None:
        self.name, self.part, self.data, self.stages = name, part, data, stages

    def _fit(self, variant: str, k: float, lr: float, seed: int, strength: float = 1.0, control: str = "") -> SAE:
        p = self.part
        size = Size(next(iter(self.data.train.values())).shape[1], p.d_sae, k, p.modalities, p.steps, p.rows)
        how = {"scale": SPARSITY, "strength": strength, "control": control, "normaliser": p.normaliser}
        return fit(sae_recipes()[variant], size, self.data.train, lr, seed, **how)

    def _tried(self, variant: str, lr: float, strength: float = 1.0) -> dict[str, float]:
        """FVU and L0 at the middle k on the rows to choose on."""
        name = f"choices/{self.name}-{variant}-{lr:g}-{strength:g}"
        k = self.middle
        return self.stages.run(name, lambda: front(self._fit(variant, k, lr, TUNING_SEED, strength), self.data.choose))

    @property
    def middle(self) -> int:
        """The k of choices and controls."""
        return self.part.ks[len(self.part.ks) // 2]

    def choices(self) -> dict[str, dict[str, Any]]:
        """Learning rate of every variant, and strength for every k where it has no k; and what they come from."""
        out: dict[str, dict[str, Any]] = {}
        for variant in sorted(self.part.variants, key=lambda v: scaled_terms(sae_recipes()[v], SPARSITY)):
            if scaled_terms(sae_recipes()[variant], SPARSITY):
                lr = out[self.part.controlled]["lr"]
                tried = {s: self._tried(variant, lr, s) for s in STRENGTHS}
                strength = {k: chosen_strength(tried, k) for k in self.part.ks}
            else:
                tried = {lr: self._tried(variant, lr) for lr in LRS}
                lr, strength = chosen_lr(tried, self.middle), dict.fromkeys(self.part.ks, 1.0)
            out[variant] = {"lr": lr, "strength": strength, "tried": tried}
        return out

    def rows(self, choices: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Figures of every variant at every k, and of the controls of one at the middle k, over seeds."""
        asked = [(v, k, "") for v in self.part.variants for k in self.part.ks]
        asked += [(self.part.controlled, self.middle, c) for c in CONTROLS]
        for variant, k, control in asked:
            own = choices[variant]
            how = {"lr": own["lr"], "strength": own["strength"][k], "control": control}

            def once(seed: int, variant: str = variant, k: int = k, how: dict = how) -> dict[str, float]:
                return self.data.score(self._fit(variant, k, seed=seed, **how))

            label = f"{variant} ({control})" if control else variant
            runs = [
                self.stages.run(f"runs/{self.name}-{label}-{k}-{seed}", lambda s=seed, once=once: once(s))
                for seed in seeds
            ]
            yield {"sae": label, "control": control, "k": k, **over_seeds(runs)}


def main(argv: Sequence[str] | None = None) -> Path:
    """Run everything that is not done yet; returns the path of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, default=Path("../shared/hosts/lite0"), help="folder of the host of images")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of tiny_imagenet and cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/variants_real"))
    parser.add_argument("--parts", nargs="+", default=["images", "pairs"], choices=["images", "pairs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="few images, steps and latents, one seed")
    args = parser.parse_args(argv)
    parts = {"images": (IMAGES, images_of), "pairs": (PAIRS, pairs_of)}
    if args.quick:
        args.seeds = args.seeds[:1]
        parts = {name: (part._replace(d_sae=64, steps=40), make) for name, (part, make) in parts.items()}
    sizes = {name: part._asdict() for name, (part, _) in parts.items()}
    start = time.process_time()
    stages = stages_of(args.out, {"benchmark": "variants_real", "site": SITE, "sizes": sizes, "quick": args.quick})
    found: dict[str, Any] = {"seeds": args.seeds, "parts": {}}
    for name in args.parts:
        part, make = parts[name]
        data = make(args)
        benchmark = Benchmark(name, part, data, stages)
        choices = benchmark.choices()
        found["parts"][name] = {
            "size": part._asdict(), "rows": len(next(iter(data.train.values()))), "host": data.host(),
            "choices": choices, "table": list(benchmark.rows(choices, args.seeds)),
        }  # fmt: skip
    write_json(args.out / "results.json", found)
    path = write_report(args.out, found)
    print(f"{time.process_time() - start:.0f} CPU-seconds: {path}")
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

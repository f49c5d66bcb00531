"""What latents of a pretrained host fire on, as two pictures: the best, the ordinary, and those of random weights.

    python benchmarks/real_concepts.py --data ../shared/data/clothing --figure FIGURE.png --gallery GALLERY.png

The host is EfficientNet-Lite0 (``lite0``) at its last maps. Its SAE, of ``mmsae look``'s size, learns from the first of
two shards of clothing-dataset-small (https://github.com/alexeygrigorev/clothing-dataset-small, photographs of garments,
CC0 1.0), and both pictures show photographs of the second: the figure few of each latent, the gallery all nine that its
class is counted of. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ood_real import SAE as AT
from ood_real import train
from PIL import Image

from mmsae.activations import extract
from mmsae.evaluation.card.gallery import Shown, draw
from mmsae.evaluation.card.top_images import SAME, TOP, Purity, purity
from mmsae.evaluation.options import RANDOM, EvaluationRun
from mmsae.evaluation.rows import TRAINED
from mmsae.evaluation.suite import parse_suite
from mmsae.evaluation.suite_data import SuiteData
from mmsae.files import atomic_file
from mmsae.load import load_pair
from mmsae.metrics.sparsity import latent_sums
from mmsae.report.figures import canvas
from mmsae.sae import SAE

SITE, LATENTS, K, STEPS = "blocks.6:out[all]", 640, 8, 1500
GAP = 22  # pixels between latents
DARK = 0.8  # brightness where a latent is silent
TITLES = {
    (TRAINED, "best"): "SAE, the best latents (one a class)",
    (TRAINED, "median"): "SAE, latents around the median",
    (RANDOM, "best"): "random weights, the best latents (one a class)",
    (RANDOM, "median"): "random weights, latents around the median",
}


class Layout(NamedTuple):
    """What a picture shows of every line of :data:`TITLES`."""

    latents: dict[str, int]  #: Of each kind
    across: int  #: Latents beside each other
    images: int  #: Of a latent
    side: int  #: Of a photograph, in pixels


FIGURE = Layout({"best": 4, "median": 4}, 4, 4, 58)
GALLERY = Layout({"best": 6, "median": 4}, 2, TOP, 52)


class Ranked(NamedTuple):
    """Latents of one SAE, in the order of how many of their nine strongest photographs are of one class."""

    purity: Purity  #: Of every latent
    order: list[int]  #: Latents that fire on nine photographs or more, the best first

    def chosen(self, kind: str, n: int) -> list[int]:
        """Some latents; ``best``: the first of different classes; ``median``: those in the middle of the order."""
        if kind == "median":
            start = max(0, (len(self.order) - n) // 2)
            return self.order[start : start + n]
        first = {int(self.purity.label[j]): j for j in reversed(self.order)}
        return sorted(first.values(), key=self.order.index)[:n]


def ranked(z: Any, labels: torch.Tensor) -> Ranked:
    """Rank the latents of some codes; among equals the one with more energy is first."""
    found, energy = purity(z, labels), latent_sums(z)[1]
    key = found.count.double() + energy / energy.sum().clamp(min=1e-300)
    whole = found.whole.nonzero()[:, 0]
    return Ranked(found, whole[key[whole].argsort(descending=True, stable=True)].tolist())


def sae_of(data: Path, out: Path, host: str, seed: int) -> Path:
    """The SAE, trained on the first shard unless it is there."""
    shard, store = str(data / "clothing-000000.tar.gz"), out / "store"
    if not (store / "spec.json").exists():
        extract(host, shard, store, sites=[SITE], dtype="float16", workers=0, batch_size=32, progress=False)
    steps = ["--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", str(STEPS)]
    size = [f"{AT}ratio", "null", f"{AT}d_sae", str(LATENTS), f"{AT}selector.init_args.k", str(K)]
    train("configs/train/topk_store.yaml", store, out / str(seed), seed, [*steps, *size])
    return out / str(seed) / "sae"


def held_out(data: Path, sae: Path, out: Path, host: str, seed: int) -> SuiteData:
    """The photographs of the second shard, through the SAE and one of random weights; nothing else is read."""
    sets = dict.fromkeys(("train", "test"), "clothing-000001.tar.gz")
    suite = parse_suite({"data": sets, "label": "class", "heads": ["top_images"]}, root=str(data))
    model, loaded = load_pair(SAE.from_pretrained(sae), host, "cpu")
    return SuiteData(suite, model, loaded, EvaluationRun(cache=str(out / "cache"), progress=False), seed=seed)


def images_of(data: SuiteData, wanted: Mapping[str, Sequence[Shown]], names: Sequence[str]) -> dict[Any, Image.Image]:
    """The photographs of latents, darker where a latent is silent."""
    drawn = draw(data, "train", wanted, names, DARK)
    return {k: Image.open(io.BytesIO(base64.b64decode(t.uri.partition(",")[2]))) for k, t in drawn.items()}


def figure(data: SuiteData, path: Path, layout: Layout = FIGURE) -> dict[str, Any]:
    """Write a picture; returns what it says in numbers."""
    f = data.features("train")
    sides = {c: ranked(g.z, f.labels) for c, g in ((TRAINED, f), (RANDOM, data.control("train")))}
    rows = {
        (control, kind): [Shown(control, j) for j in sides[control].chosen(kind, layout.latents[kind])]
        for control, kind in TITLES
    }
    wanted: dict[str, list[Shown]] = {}
    for s in {s for own in rows.values() for s in own}:
        for row in sides[s.control].purity.rows[s.latent][: layout.images].tolist():
            wanted.setdefault(f.uids[row], []).append(s)
    images = images_of(data, wanted, f.names)
    step = layout.side + 2
    group, tall = layout.images * step + GAP, layout.side + 18
    lines = {line: -(-layout.latents[line[1]] // layout.across) for line in TITLES}  # rows of latents
    width, height = layout.across * group - GAP + 8, sum(16 + n * tall for n in lines.values()) + 2
    with canvas(width=width / 100, height=height / 100) as (fig, ax):
        fig.set_layout_engine("none")
        ax.set_position((0, 0, 1, 1))
        ax.axis("off")
        top = 0
        for line, title in TITLES.items():
            ax.text(4, top + 12, title, fontsize=8, weight="bold")
            for g, s in enumerate(rows[line]):
                p, left = sides[s.control].purity, 4 + g % layout.across * group
                y = top + 16 + g // layout.across * tall
                said = f"#{s.latent}: {int(p.count[s.latent])} of {TOP} {f.names[int(p.label[s.latent])]}"
                ax.text(left, y + 10, said, fontsize=7, color="#555")
                for i, row in enumerate(p.rows[s.latent][: layout.images].tolist()):
                    x, low = left + i * step, y + 14 + layout.side
                    box = (x, x + layout.side, low, y + 14)
                    ax.imshow(images[s, f.uids[row]], extent=box, aspect="auto")
            top += 16 + lines[line] * tall
        ax.set(xlim=(0, width), ylim=(height, 0))
        made = io.BytesIO()
        fig.savefig(made, format="png", dpi=100)
    with atomic_file(path) as temp:
        Image.open(made).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(temp, "png", optimize=True)
    return {
        control or "SAE": {
            "latents that fire on nine photographs": len(side.order),
            "of which five of one class": sum(int(side.purity.count[j]) >= SAME for j in side.order),
            "photographs": f.n,
        }
        for control, side in sides.items()
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Train what is not there, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two shards")
    parser.add_argument("--out", type=Path, default=Path("runs/real_concepts"))
    parser.add_argument("--figure", type=Path, help="where the figure goes; default: OUT/real_concepts.png")
    parser.add_argument("--gallery", type=Path, help="where the gallery goes; default: OUT/real_gallery.png")
    parser.add_argument("--host", default="lite0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sae = sae_of(args.data, args.out, args.host, args.seed)
    data = held_out(args.data, sae, args.out, args.host, args.seed)
    path = args.figure or args.out / "real_concepts.png"
    gallery = args.gallery or args.out / "real_gallery.png"
    print(figure(data, path))
    figure(data, gallery, GALLERY)
    print(path, gallery)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

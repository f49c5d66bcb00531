"""Areas and patches matched between two views of real photographs, whose true correspondence is a known homography.

    python benchmarks/areas.py --hosts FOLDER --data FOLDER --out runs/areas

Hosts are timm folders. An SAE (TopK) learns from the patches of some photographs; others are seen twice, the second
time through a random homography, mirrored in half of the cases. Patches are matched by mutual nearest neighbours: of
the host's features (less their mean), of codes, of the codes of random weights, and of their place alone. Areas are
those of the codes, matched by codes, by features pooled over them, by half of each, by the codes of random weights, and
by place alone; and they are sent over patch by patch, by codes and by features.

A pair of patches is right where the second lies within one patch of where the first went; a pair of areas where the
warped first and the second have an intersection over union above .5. Recall is of all patches that stay in view, and of
all areas for which a right partner exists. Intervals are 95% bootstraps over photographs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.files import write_json
from mmsae.hosts import load_host
from mmsae.interpret.areas.areas import Areas, find_areas
from mmsae.interpret.areas.connected import iou
from mmsae.interpret.areas.match import MatchOptions, dense_similarity, match_areas, pool_dense, similarities
from mmsae.interpret.areas.patches import AreaLatents, AreaOptions, PatchCodes
from mmsae.interpret.areas.transfer import patch_cosines, transfer_areas, warp_masks
from mmsae.metrics.statistics import bootstrap_ratio
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE, AuxK, Normaliser, Reconstruction, TopK, random_control
from mmsae.shards import FaultLog, read_shards
from mmsae.training.plain import train
from mmsae.types import ImageTextBatch

SIZE = 224
HOSTS = {"lite0": "blocks.4:out[all]", "dinov2_s14": "blocks.8:out[patches]"}
OPTIONS = AreaOptions()


class Case(NamedTuple):
    """What a host gives of photographs."""

    train: Tensor  #: ``(n, P, d)``
    views: Tensor  #: ``(m, 2, P, d)``
    grid: tuple[int, int]
    sources: list[np.ndarray]  #: For every photograph, ``(SIZE * SIZE,)`` the pixel that each pixel of view 2 shows


def photographs(path: Path, n: int) -> Iterator[Image.Image]:
    """The first photographs of a shard, as squares."""
    for sample in islice(read_shards([path], FaultLog()), n):
        image = sample.image
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        yield image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.BICUBIC)


def homography(rng: np.random.Generator) -> np.ndarray:
    """``(3, 3)`` from pixels of view 2 to those of view 1, all of which it has: a quadrangle within the image, turned
    by up to 15 degrees, of 55 to 85 % of its side, mirrored in half of the cases.
    """
    half = SIZE * rng.uniform(0.55, 0.85) / 2
    angle = np.deg2rad(rng.uniform(-15, 15))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    corners = corners @ turn.T + rng.uniform(-0.12, 0.12, (4, 2)) * half
    room = SIZE - (corners.max(0) - corners.min(0))
    corners += rng.uniform(0, 1, 2) * np.maximum(room, 0) - corners.min(0)
    corners = corners.clip(0, SIZE)
    if rng.random() < 0.5:
        corners = corners[[1, 0, 3, 2]]
    square = np.array([[0, 0], [SIZE, 0], [SIZE, SIZE], [0, SIZE]], float)
    rows = []
    for (x, y), (u, v) in zip(square, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y, u], [0, 0, 0, x, y, 1, -v * x, -v * y, v]]
    table = np.array(rows)
    return np.append(np.linalg.solve(table[:, :8], table[:, 8]), 1).reshape(3, 3)


def apply(h: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """``(n, 2)`` points through a homography."""
    out = np.c_[xy, np.ones(len(xy))] @ h.T
    return out[:, :2] / out[:, 2:]


def centres(rows: int, cols: int) -> np.ndarray:
    """``(rows * cols, 2)`` x, y in pixels of the centres of a grid's cells."""
    y, x = np.meshgrid((np.arange(rows) + 0.5) * SIZE / rows, (np.arange(cols) + 0.5) * SIZE / cols, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], 1)


@torch.no_grad()
def features(host: Any, images: Sequence[Image.Image], site: str) -> Tensor:
    """``(n, P, d)`` rows at a site."""
    # its arithmetic without its crop: views are of the host's size already
    make = [t for t in host.transform().transforms if "Tensor" in type(t).__name__ or "Normalize" in type(t).__name__]
    out = []
    for lo in range(0, len(images), 16):
        pixels = torch.stack([reduce(lambda x, t: t(x), make, i) for i in images[lo : lo + 16]])
        rows = host.read(ImageTextBatch(pixels, None, [""] * len(pixels), [], [], []), [site])[0]
        out.append(rows.x.reshape(len(pixels), -1, rows.x.shape[1]).float())
    return torch.cat(out)


def prepare(name: str, args: argparse.Namespace) -> Case:
    """Host over photographs and their second views."""
    host = load_host(f"timm:local-dir:{args.hosts / name}")
    shards = [args.data / "captioned_vi" / f"captioned_vi-00000{i}.tar.gz" for i in range(2)]
    learn = features(host, list(photographs(shards[0], args.train)), HOSTS[name])
    rng, pairs, maps = np.random.default_rng(0), [], []
    for image in photographs(shards[1], args.pairs):
        h = homography(rng)
        maps.append(h)
        flat = (h / h[2, 2]).ravel()[:8]
        pairs += [image, image.transform((SIZE, SIZE), Image.PERSPECTIVE, flat.tolist(), Image.BICUBIC)]
    both = features(host, pairs, HOSTS[name])
    side = int(both.shape[1] ** 0.5)
    return Case(learn, both.reshape(-1, 2, *both.shape[1:]), (side, side), maps)


def fitted(case: Case, seed: int, steps: int, ratio: int) -> SAE:
    """An SAE on the patches of the training photographs."""
    torch.manual_seed(seed)
    x = case.train.flatten(0, 1)
    sae = SAE({"image": x.shape[1]}, ratio=ratio, selector=TopK(32), modalities=("image",),
              normaliser=Normaliser(centre=True, unit_out=True))  # fmt: skip
    sae.fit_normaliser({"image": x})
    draw = torch.Generator().manual_seed(seed)
    batches = iter(lambda: {"image": x[torch.randint(len(x), (1024,), generator=draw)]}, None)
    train(sae, [Reconstruction(), AuxK(dead_after=100_000)], batches, steps, lr=1e-3, seed=seed)
    return sae


@torch.no_grad()
def entries(sae: SAE, x: Tensor) -> list[PatchCodes]:
    """Codes of the patches of images ``(n, P, d)``."""
    side = int(x.shape[1] ** 0.5)
    return [PatchCodes.of_codes(sae.encode(v, modality="image"), side, side) for v in x]


def corpus(codes: Sequence[PatchCodes]) -> AreaLatents:
    """What is known of latents from the training photographs."""
    item = np.repeat(np.arange(len(codes)), [len(c.value) for c in codes])
    latent, place, value = (np.concatenate([c[k] for c in codes]) for k in range(3))
    first = codes[0]
    return AreaLatents.of_entries(
        item, latent, place, value, (len(codes), first.rows * first.cols, first.d_sae), OPTIONS
    )


def mutual(cosines: np.ndarray) -> np.ndarray:
    """``(M, 2)`` pairs that are each other's nearest; patches without anything in common are none."""
    to, back = cosines.argmax(1), cosines.argmax(0)
    i = np.flatnonzero((back[to] == np.arange(len(to))) & (cosines.max(1) > 0))
    return np.stack([i, to[i]], 1)


class Tally:
    """Right, proposed and possible pairs by photograph and method; SAEs come one after the other."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[float, float, float, float]]] = {}

    def add(self, name: str, right: float, proposed: float, possible: float, overlap: float = np.nan) -> None:
        self.rows.setdefault(name, []).append((right, proposed, possible, overlap))

    def figures(self, photographs: int) -> dict[str, dict[str, Any]]:
        """Precision and recall with intervals over photographs, each with what all SAEs make of it."""
        out = {}
        for name, rows in self.rows.items():
            right, proposed, possible, overlap = (
                torch.tensor(rows, dtype=torch.float64).reshape(-1, photographs, 4).nansum(0).T
            )
            out[name] = {"proposed": int(proposed.sum()), "possible": int(possible.sum()), "photographs": photographs}
            for key, of in (("precision", proposed), ("recall", possible)):
                out[name][key] = float(right.sum() / of.sum().clamp(min=1))
                out[name][f"{key}_interval"] = bootstrap_ratio(right, of)
            out[name]["overlap"] = float(np.nansum(overlap) / max(float(proposed.sum()), 1))
        return out


def patch_pairs(tally: Tally, name: str, cosines: np.ndarray, h: np.ndarray, grid: tuple[int, int]) -> None:
    """Mutual nearest patches beside where they went."""
    at = centres(*grid)
    went = apply(np.linalg.inv(h), at)
    seen = ((went > 0) & (went < SIZE)).all(1)
    pairs = mutual(cosines)
    off = np.abs(went[pairs[:, 0]] - at[pairs[:, 1]]).max(1) if len(pairs) else np.zeros(0)
    tally.add(name, float((off <= SIZE / grid[0]).sum()), len(pairs), int(seen.sum()))


def area_pairs(
    tally: Tally, name: str, first: Areas, second: Areas, warped: Any, options: MatchOptions, s: Any = None
) -> None:  # fmt: skip
    """Matched areas beside where they went."""
    over = iou(warped, second.masks)
    pairs = match_areas(first, second, options, s).pairs if over.size else np.zeros((0, 2), int)
    hit = over[pairs[:, 0], pairs[:, 1]]
    possible = int((over.max(1) > 0.5).sum()) if over.size else 0
    tally.add(name, float((hit > 0.5).sum()), len(pairs), possible, float(hit.sum()))


def sent(tally: Tally, name: str, areas: Areas, cosines: np.ndarray, warped: Any, grid: tuple[int, int]) -> None:
    """Areas sent patch by patch beside where they went."""
    moved = transfer_areas(areas, cosines, (grid, grid))
    inside = np.diff(warped.indptr) >= 2 * OPTIONS.least_patches  # so much of it is to be seen
    over = np.asarray(iou(warped, moved.masks).diagonal()) if areas.n else np.zeros(0)
    tally.add(name, float((over[moved.accepted] > 0.5).sum()), int(moved.accepted.sum()), int(inside.sum()),
              float(over[moved.accepted].sum()))  # fmt: skip


def compare(case: Case, sae: SAE, tally: Tally, seed: int) -> dict[str, float]:
    """All methods with one SAE."""
    control = random_control(sae, seed)
    known = {n: corpus(entries(s, case.train[:200])) for n, s in (("codes", sae), ("random", control))}
    mean = case.train.flatten(0, 1).mean(0)
    mutual_options, one = MatchOptions("mutual"), MatchOptions("one")
    found = []
    for views, h in zip(case.views, case.sources, strict=True):
        dense = [(v - mean).numpy() for v in views]
        unit = [v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-9) for v in dense]
        raw = unit[0] @ unit[1].T
        codes = {"codes": entries(sae, views), "random": entries(control, views)}
        near = {n: patch_cosines(*(c.keep(known[n].usable) for c in pair), known[n].idf) for n, pair in codes.items()}
        patch_pairs(tally, "patches, features", raw, h, case.grid)
        for n in codes:
            patch_pairs(tally, f"patches, {n}", near[n], h, case.grid)
        patch_pairs(tally, "patches, place", np.eye(len(raw)), h, case.grid)
        areas = {n: [find_areas(c, known[n], OPTIONS) for c in pair] for n, pair in codes.items()}
        fine = tuple(n * OPTIONS.upsample for n in case.grid)
        source = apply(h, centres(*fine))
        inside = ((source >= 0) & (source < SIZE)).all(1)
        col, row = (source.clip(0, SIZE - 1e-6).T * np.array(fine[::-1])[:, None] / SIZE).astype(int)
        cells = np.where(inside, row * fine[1] + col, -1)
        warped = {n: warp_masks(a.masks, fine, cells) for n, (a, _) in areas.items()}
        a, b = areas["codes"]
        w = warped["codes"]
        found.append(a.n)
        pooled = dense_similarity(
            *(pool_dense(x, d.reshape(*case.grid, -1)) for x, d in zip((a, b), dense, strict=True))
        )
        own = similarities(a.descriptor, b.descriptor)
        area_pairs(tally, "areas, codes", a, b, w, mutual_options)
        area_pairs(tally, "areas, codes, one to one", a, b, w, one)
        area_pairs(tally, "areas, codes, no relatives", a, b, w, MatchOptions("mutual", relatives=False))
        area_pairs(tally, "areas, features", a, b, w, mutual_options, pooled)
        area_pairs(tally, "areas, half of each", a, b, w, mutual_options, (own + pooled) / 2)
        area_pairs(tally, "areas, place", a, b, w, mutual_options, iou(a.masks, b.masks))
        area_pairs(tally, "areas, random", *areas["random"], warped["random"], mutual_options)
        sent(tally, "sent, codes", a, near["codes"], w, case.grid)
        sent(tally, "sent, features", a, raw, w, case.grid)
    x = case.train[:200].flatten(0, 1)
    with torch.no_grad():
        off = ((sae({"image": x})["image"].x_hat - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    return {"fvu": float(off), "areas": float(np.mean(found)), "usable": float(known["codes"].usable.mean())}


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Markdown."""

    def cell(f: dict[str, Any], key: str) -> str:
        low, high = f[f"{key}_interval"]
        return f"{f[key]:.3f} ({low:.3f}–{high:.3f})"

    rows = [
        [n, cell(f, "precision"), cell(f, "recall"), f["overlap"] if "patches" not in n else None, f["proposed"]]
        for n, f in figures.items()
    ]
    return markdown_table(["matched by", "precision", "recall", "mean overlap", "pairs proposed"], rows)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run both hosts; returns the path of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=Path, required=True, help="folder of the hosts' folders")
    parser.add_argument("--data", type=Path, required=True, help="folder that captioned_vi lies in")
    parser.add_argument("--out", type=Path, default=Path("runs/areas"))
    parser.add_argument("--cases", nargs="+", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--train", type=int, default=600, help="photographs that SAEs learn from")
    parser.add_argument("--pairs", type=int, default=100, help="photographs that are seen twice")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of 1,024 patches")
    parser.add_argument("--ratio", type=int, default=8, help="latents per feature")
    args = parser.parse_args(argv)
    lines, results, start = [], {}, time.process_time()
    for name in args.cases:
        case, tally, about = prepare(name, args), Tally(), []
        for seed in args.seeds:
            sae = fitted(case, seed, args.steps, args.ratio)
            about.append(compare(case, sae, tally, seed))
            print(name, seed, json.dumps(about[-1]), f"{time.process_time() - start:.0f} s", flush=True)
        figures = tally.figures(len(case.sources))
        results[name] = {"site": HOSTS[name], "grid": case.grid, "saes": about, "figures": figures}
        lines += [f"### {name}, {HOSTS[name]}", "", table(figures), ""]
    write_json(args.out / "areas.json", results)
    path = args.out / "areas.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    print(f"{time.process_time() - start:.0f} CPU-seconds: {path}")
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

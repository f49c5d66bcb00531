"""Size and speed of the browser of ``mmsae explore``, by the number of latents, samples and patches.

    python -m benchmarks.browser [--latents 16384 65536] [--samples 40000 60000] [--patches 0] [--folder DIR]

Evidence of random codes is written: latents of very different frequency, every image and every text with 32
of them, names for a third of the latents, labels for all samples, atoms for the map, and with ``--patches`` a
grid of so many rows and columns on which a latent fires at ``--fill`` of the patches on average. The browser
of it is opened in a headless Chromium (which has to be installed, with aiohttp) from files that the system
has read before: the first view is there when pictures of the first latents are, the least of three runs; a
search is the largest of several words, each the least of three.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from mmsae.interpret.browser.command import explore
from mmsae.interpret.browser.options import Display
from mmsae.interpret.evidence.folder import ABOUT, BINS, EDGES, FORMAT, ITEMS
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.report.tables import markdown_table

WORDS = "red blue dog cat tree house car boat sky grass stone water night snow street table chair bread cup jay".split()
QUANTILES, EACH, PIXELS, LABELS, WIDTH = 10, 4, 96, 100, 64
SEARCHES = ("red", "dog cat", "snow", "number 77", "misspeld", "tree 4")
THERE = "document.querySelectorAll('.tile img').length > 5"


def write_large(
    folder: Path, d_sae: int, n: int, *, k: int = 32, n_top: int = 9, patches: int = 0, fill: float = 0.2,
    seed: int = 0,
) -> Path:  # fmt: skip
    """Evidence of latents of log-normal frequency; every item has k of them in its image and k in its text, half of
    them the same. Images are smooth noise of as many bytes as photographs have; the SAE lies in ``sae`` beside it.

    Args:
        folder: Folder to write.
        d_sae: Number of latents.
        n: Number of items.
        k: Latents of an image, and of a text.
        n_top: Top items of a latent.
        patches: Rows and columns of the grid of images; 0: none.
        fill: Share of the patches on which a latent fires in an image, on average.
        seed: Of everything that is drawn.
    """
    from mmsae.sae import SAE, TopK
    from mmsae.sae.fingerprint import sae_fingerprint

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0, 1, d_sae)
    cdf = np.cumsum(weight / weight.sum())
    draw = np.searchsorted(cdf, rng.random((n, k)))
    latents = {"image": draw, "text": np.where(np.arange(k) < k // 2, draw, np.searchsorted(cdf, rng.random((n, k))))}
    stats, top, examples = {}, {}, {}
    for m, j in latents.items():
        rows = np.repeat(np.arange(n), k)
        z = csr_matrix((rng.gamma(2, 0.5, n * k).astype(np.float32), (rows, j.ravel())), (n, d_sae))
        z.sum_duplicates()
        save(folder / f"codes-{m}.safetensors", start=z.indptr.astype(np.int64), latent=z.indices.astype(np.int32),
             value=z.data, position=np.zeros(z.nnz, np.int32))  # fmt: skip
        c = z.tocsc()
        c.sort_indices()
        save(folder / f"lists-{m}.safetensors", start=c.indptr.astype(np.int64), item=c.indices.astype(np.int32),
             value=c.data)  # fmt: skip
        start, latent, position, value = tokens(rng, z, patches if m == "image" else 0, fill)
        save(folder / f"tokens-{m}.safetensors", item=np.arange(n, dtype=np.int32), start=start, latent=latent,
             position=position, value=value)  # fmt: skip
        count = np.diff(c.indptr).astype(np.int64)
        owner = np.repeat(np.arange(d_sae), count)
        bins = np.zeros((d_sae, BINS), np.int64)
        np.add.at(bins, (owner, np.clip(np.searchsorted(EDGES, c.data) - 1, 0, BINS - 1)), 1)
        stats |= {
            f"{m}.fired_rows": count, f"{m}.fired_items": count, f"{m}.histogram": bins,
            f"{m}.sum": np.asarray(z.sum(0), np.float64).ravel(),
            f"{m}.sum_sq": np.asarray(z.multiply(z).sum(0), np.float64).ravel(),
            f"{m}.max": np.asarray(z.max(0).todense(), np.float32).ravel(),
        }  # fmt: skip
        order = np.lexsort((-c.data, owner))
        item, sorted_values = c.indices[order], c.data[order]
        place = np.arange(n_top)[None]
        has = place < count[:, None]
        at = np.minimum(c.indptr[:-1, None] + place, c.nnz - 1)
        top |= {
            f"{m}.value": np.where(has, sorted_values[at], 0).astype(np.float32),
            f"{m}.item": np.where(has, item[at], -1).astype(np.int32),
            f"{m}.position": np.zeros((d_sae, n_top), np.int32),
        }
        part = (np.arange(QUANTILES)[:, None] + rng.random((d_sae, QUANTILES, EACH))) / QUANTILES
        at = np.minimum(c.indptr[:-1, None, None] + np.floor(part * count[:, None, None]).astype(int), c.nnz - 1)
        examples[f"{m}.positive"] = np.where(count[:, None, None] > 0, item[at], -1).astype(np.int32)
    save(folder / "stats.safetensors", **stats)
    save(folder / "top.safetensors", **top)
    save(folder / "examples.safetensors", **examples)
    blobs = [picture(rng) for _ in range(64)]
    size = np.array([len(blobs[i % 64]) for i in range(n)])
    every = np.arange(n, dtype=np.int32)
    save(folder / "thumbnails.safetensors", item=every, start=np.concatenate([[0], np.cumsum(size)]),
         bytes=np.frombuffer(b"".join(blobs[i % 64] for i in range(n)), np.uint8))  # fmt: skip
    save(
        folder / "views.safetensors", item=np.arange(n, dtype=np.int32), view=np.tile(np.float32([0, 0, 1, 1]), (n, 1))
    )
    caption = [f"a photo of a {WORDS[draw[i, 0] % 20]} and a {WORDS[draw[i, 1] % 20]}, number {i}" for i in range(n)]
    label = [f"class {draw[i, 0] % LABELS}" for i in range(n)]
    table = {"uid": [f"{i:032x}" for i in range(n)], "shard": ["s-0.tar"] * n, "key": [f"{i:06d}" for i in range(n)],
             "caption": caption, "label": label, "half": [("train", "test")[i % 2] for i in range(n)],
             "copy_of": np.full(n, -1, np.int32)}  # fmt: skip
    for name in ("copy_of_image", "copy_of_text"):
        table[name] = np.full(n, -1, np.int32)
    pq.write_table(pa.table(table), folder / ITEMS)
    sae = SAE(WIDTH, d_sae, selector=TopK(k))
    sae.save_pretrained(folder.parent / "sae")
    own = sae_fingerprint(sae)
    names = {j: LatentName(f"{WORDS[j % 20]} {j % 997}", "captions", 1.0, auroc=0.8) for j in range(0, d_sae, 3)}
    write_names(folder / "names" / "names.json", names, own)
    grids = {m: {"rows": 0, "cols": 0, "places": 1, "steps": []} for m in latents}
    if patches:
        grids["image"] |= {"rows": patches, "cols": patches, "places": patches**2}
    job = {"sae": own, "host": "h" * 32}
    about = {"format": FORMAT, "job": job, "n_items": n, "d_sae": d_sae, "modalities": list(latents), "faults": {},
             "grid": grids, "captions": True, "images": True, "embedder": {}}  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


def tokens(rng: np.random.Generator, z: csr_matrix, patches: int, fill: float) -> tuple[np.ndarray, ...]:
    """``start`` of items, and ``latent``, ``position`` and ``value`` of what fires in their rows; at most ``z``."""
    if not patches:
        return z.indptr.astype(np.int64), z.indices.astype(np.int32), np.zeros(z.nnz, np.int32), z.data
    places = patches**2
    size = rng.geometric(1 / max(fill * places, 1), z.nnz).clip(1, places)
    first = np.cumsum(size) - size
    offset = np.arange(size.sum(), dtype=np.int32) - np.repeat(first, size).astype(np.int32)
    # a run of patches from somewhere: as connected as areas are
    begin = (rng.random(z.nnz) * (places - size + 1)).astype(np.int32)
    value = np.repeat(z.data, size) * rng.random(len(offset), np.float32)
    value[first] = z.data
    return (
        np.concatenate([[0], np.cumsum(size)])[z.indptr].astype(np.int64),
        np.repeat(z.indices.astype(np.int32), size),
        np.repeat(begin, size) + offset,
        np.maximum(value, 1e-6),
    )


def picture(rng: np.random.Generator) -> bytes:
    """A WebP of noise at several scales: about as hard to compress as a photograph."""
    out = np.zeros((PIXELS, PIXELS, 3))
    for s in (4, 8, 16, 32, 48):
        small = Image.fromarray((rng.random((s, s, 3)) * 255).astype(np.uint8)).resize((PIXELS, PIXELS), Image.BICUBIC)
        out += np.asarray(small, float) / s
    out = (out - out.min()) / (out.max() - out.min()) * 255
    file = io.BytesIO()
    Image.fromarray(out.astype(np.uint8)).save(file, "webp", quality=80)
    return file.getvalue()


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays."""
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)


def meta_of(browser: Path) -> dict[str, Any]:
    """What the browser in a folder says of its first panel."""
    return json.loads((browser / "data/main/meta.js").read_text().split(",", 1)[1].rsplit(")", 1)[0])


def seen(window: Any, browser: Path, times: int = 3) -> dict[str, Any]:
    """Seconds to the first view, milliseconds of the slowest search and of going back to all latents.

    Args:
        window: A :class:`tests.helpers.window.Window`.
        browser: Folder of the browser.
        times: How often each is done; the least counts, for other processes may have the core for a while.
    """
    first = []
    for _ in range(times):
        window.open("about:blank")
        first.append(window.open(f"file://{browser}/index.html", THERE))
    window.run("mmsae.panel('main').then((p) => mmsae.index(p).ready).then(() => 1)")

    def least(words: str) -> float:
        at = json.dumps({"query": words, "filter": "all", "order": "", "up": False, "area": None})
        return min(
            window.run(f"""(() => {{
            const page = document.querySelector(".overview"), times = [];
            for (let i = 0; i < {times}; i++) {{
                const start = performance.now();
                page.update({at});
                times.push(performance.now() - start);
            }}
            return times;
        }})()""")
        )

    return {"first": min(first), "search": max(map(least, SEARCHES)), "all": least("")}


def main(argv: Sequence[str] | None = None) -> None:
    """See the head of this module."""
    from tests.helpers.chromium import Chromium

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--samples", type=int, nargs="+", default=[40000, 60000], help="as many as --latents")
    parser.add_argument("--patches", type=int, nargs="+", default=[0], help="rows of the grid: one, or as many")
    parser.add_argument("--map-megabytes", type=float, default=Display().map_megabytes, help="as of mmsae explore")
    parser.add_argument("--fill", type=float, default=0.2, help="share of the patches on which a latent fires")
    parser.add_argument("--folder", type=Path, help="default: one that is removed in the end")
    args = parser.parse_args(argv)
    sizes = args.patches * (len(args.latents) if len(args.patches) == 1 else 1)
    rows, display = [], Display(top=9, map_megabytes=args.map_megabytes)
    with tempfile.TemporaryDirectory() as temp:
        for i, (d_sae, n, patches) in enumerate(zip(args.latents, args.samples, sizes, strict=True)):
            run = (args.folder or Path(temp)) / str(i)
            write_large(run / "evidence", d_sae, n, patches=patches, fill=args.fill)
            start = time.perf_counter()
            made = explore(str(run / "evidence"), progress=False, display=display)
            took, meta = time.perf_counter() - start, meta_of(run / "browser")
            (run / "profile").mkdir()
            window = Chromium(run / "profile")
            try:
                found = seen(window, run / "browser")
            finally:
                window.close()
            whole, parts = made["bytes"] / 1e6, {k: v / 1e6 for k, v in meta["bytes"].items()}
            rows.append([d_sae, meta["shown"], f"{patches} x {patches}" if patches else None, round(whole),
                         round(parts["images"]), round(parts["maps"]), meta["maps"] or None, round(took),
                         round(found["first"], 2), round(found["search"]), round(found["all"])])  # fmt: skip
            print(rows[-1], flush=True)
    head = ["latents", "samples", "patches", "MB", "MB of images", "MB of maps", "maps a sample", "s to write",
            "s to the first view", "ms, slowest search", "ms back to all"]  # fmt: skip
    print(markdown_table(head, rows, digits=2))


if __name__ == "__main__":
    main()

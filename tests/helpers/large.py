"""Evidence of many latents, made of sparse codes: pooled ones of images and texts, as of CLIP."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from mmsae.interpret.evidence.folder import ABOUT, BINS, EDGES, FORMAT, ITEMS

WORDS = "red blue dog cat tree house car boat sky grass stone water night snow street table chair bread cup jay".split()


def write_large(folder, d_sae, n, k=32, n_top=9, quantiles=10, each=4, pixels=96, seed=0):
    """Latents of log-normal frequency; every item has k of them in its image and k in its text, half of them the same.
    Images are smooth noise of as many bytes as photographs have.
    """
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
        save(folder / f"tokens-{m}.safetensors", item=np.arange(n, dtype=np.int32), start=z.indptr.astype(np.int64),
             latent=z.indices.astype(np.int32), position=np.zeros(z.nnz, np.int32), value=z.data)  # fmt: skip
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
        item, value = c.indices[order], c.data[order]
        place = np.arange(n_top)[None]
        has = place < count[:, None]
        at = np.minimum(c.indptr[:-1, None] + place, c.nnz - 1)
        top |= {
            f"{m}.value": np.where(has, value[at], 0).astype(np.float32),
            f"{m}.item": np.where(has, item[at], -1).astype(np.int32),
            f"{m}.position": np.zeros((d_sae, n_top), np.int32),
        }
        part = (np.arange(quantiles)[:, None] + rng.random((d_sae, quantiles, each))) / quantiles
        at = np.minimum(c.indptr[:-1, None, None] + np.floor(part * count[:, None, None]).astype(int), c.nnz - 1)
        examples[f"{m}.positive"] = np.where(count[:, None, None] > 0, item[at], -1).astype(np.int32)
    save(folder / "stats.safetensors", **stats)
    save(folder / "top.safetensors", **top)
    save(folder / "examples.safetensors", **examples)
    blobs = [picture(rng, pixels) for _ in range(64)]
    size = np.array([len(blobs[i % 64]) for i in range(n)])
    every = np.arange(n, dtype=np.int32)
    save(folder / "thumbnails.safetensors", item=every, start=np.concatenate([[0], np.cumsum(size)]),
         bytes=np.frombuffer(b"".join(blobs[i % 64] for i in range(n)), np.uint8))  # fmt: skip
    save(
        folder / "views.safetensors", item=np.arange(n, dtype=np.int32), view=np.tile(np.float32([0, 0, 1, 1]), (n, 1))
    )
    caption = [f"a photo of a {WORDS[draw[i, 0] % 20]} and a {WORDS[draw[i, 1] % 20]}, number {i}" for i in range(n)]
    table = {"uid": [f"{i:032x}" for i in range(n)], "shard": ["s-0.tar"] * n, "key": [f"{i:06d}" for i in range(n)],
             "caption": caption, "label": [""] * n, "half": [("train", "test")[i % 2] for i in range(n)],
             "copy_of": np.full(n, -1, np.int32)}  # fmt: skip
    for name in ("copy_of_image", "copy_of_text"):
        table[name] = np.full(n, -1, np.int32)
    pq.write_table(pa.table(table), folder / ITEMS)
    grid = {"rows": 0, "cols": 0, "places": 1, "steps": []}
    job = {"sae": "s" * 32, "host": "h" * 32}
    about = {"format": FORMAT, "job": job, "n_items": n, "d_sae": d_sae, "modalities": list(latents), "faults": {},
             "grid": dict.fromkeys(latents, grid), "captions": True, "images": True, "embedder": {}}  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about))


def picture(rng, pixels):
    """A WebP of noise at several scales: about as hard to compress as a photograph."""
    out = np.zeros((pixels, pixels, 3))
    for s in (4, 8, 16, 32, 48):
        small = Image.fromarray((rng.random((s, s, 3)) * 255).astype(np.uint8)).resize((pixels, pixels), Image.BICUBIC)
        out += np.asarray(small, float) / s
    out = (out - out.min()) / (out.max() - out.min()) * 255
    file = io.BytesIO()
    Image.fromarray(out.astype(np.uint8)).save(file, "webp", quality=80)
    return file.getvalue()


def save(path, **arrays):
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)

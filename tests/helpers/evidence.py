"""A folder of evidence made of dense codes, for tests of what reads one."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from mmsae.interpret.evidence.folder import ABOUT, BINS, EDGES, FORMAT, ITEMS


def write_evidence(
    folder, tokens, *, captions=None, labels=None, images=None, embeddings=None, grid=None, n_top=8, quantiles=4,
    each=6, seed=0, **of,
):  # fmt: skip
    """Write what ``mmsae evidence`` would of ``{modality: (n, places, d_sae)}`` codes, all of it in memory.

    ``images`` are PIL images or arrays ``(n, H, W, 3)`` uint8; ``grid {modality: (rows, cols)}`` is that of the places.
    ``of`` are ``copies``, near-duplicates, and what else ``job`` is to hold: ``sae`` and ``host``.
    Halves alternate: even items are train, odd ones test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    n, _, d = next(iter(tokens.values())).shape
    half = np.array(["train", "test"])[np.arange(n) % 2]
    copy_of = np.asarray(of.pop("copies", [-1] * n), np.int32)
    stats, top, examples, chosen = {}, {}, {}, set()
    for m, z in tokens.items():
        z = z.astype(np.float32)
        pooled, position = np.abs(z).max(1), np.abs(z).argmax(1)
        fired = z != 0
        stats |= {
            f"{m}.fired_rows": fired.sum((0, 1)).astype(np.int64),
            f"{m}.fired_items": fired.any(1).sum(0).astype(np.int64),
            f"{m}.sum": z.sum((0, 1), dtype=np.float64),
            f"{m}.sum_sq": np.square(z, dtype=np.float64).sum((0, 1)),
            f"{m}.max": np.abs(z).max((0, 1)),
            f"{m}.histogram": np.stack([_histogram(z[..., j][fired[..., j]]) for j in range(d)]),
        }  # fmt: skip
        ranked = np.where((copy_of < 0)[:, None], pooled, 0)
        order = np.argsort(-ranked, 0, kind="stable")[:n_top].T
        value = np.take_along_axis(ranked.T, order, 1)
        order = np.where(value > 0, order, -1)
        pad = ((0, 0), (0, n_top - order.shape[1]))
        top |= {
            f"{m}.value": np.pad(value, pad).astype(np.float32),
            f"{m}.item": np.pad(order, pad, constant_values=-1).astype(np.int32),
            f"{m}.position": np.pad(
                np.where(order < 0, 0, np.take_along_axis(position.T, order.clip(0), 1)), pad
            ).astype(np.int32),
        }
        positive, random, hard = (np.full((d, *s), -1, np.int32) for s in ((quantiles, each), (4 * each,), (4 * each,)))
        for j in range(d):
            on = np.flatnonzero(ranked[:, j])
            on = on[np.argsort(-ranked[on, j], kind="stable")]
            for q, part in enumerate(np.array_split(on, quantiles)):
                positive[j, q, : min(each, len(part))] = part[:each]
            off = np.flatnonzero((pooled[:, j] == 0) & (copy_of < 0))
            for table in (random, hard):
                drawn = rng.permutation(off)[: 4 * each]
                table[j, : len(drawn)] = drawn
        examples |= {f"{m}.positive": positive, f"{m}.random": random, f"{m}.hard": hard}
        examples[f"{m}.eligible"] = np.ones(d, np.uint8)
        chosen |= set(np.concatenate([t.ravel() for t in (top[f"{m}.item"], positive, random, hard)]).tolist()) - {-1}
        i, j = pooled.nonzero()
        start = np.searchsorted(i, np.arange(n + 1)).astype(np.int64)
        _save(folder / f"codes-{m}.safetensors", start=start, latent=j.astype(np.int32), value=pooled[i, j],
              position=position[i, j].astype(np.int32))  # fmt: skip
        j, i = pooled.T.nonzero()
        start = np.searchsorted(j, np.arange(d + 1)).astype(np.int64)
        _save(folder / f"lists-{m}.safetensors", start=start, item=i.astype(np.int32), value=pooled[i, j])
    kept = np.array(sorted(chosen), np.int32)
    for m, z in tokens.items():
        e, j, p = np.moveaxis(z[kept], 2, 1).nonzero()  # by item, latent, position
        start = np.searchsorted(e, np.arange(len(kept) + 1)).astype(np.int64)
        _save(folder / f"tokens-{m}.safetensors", item=kept, start=start, latent=j.astype(np.int32),
              position=p.astype(np.int32), value=z[kept][e, p, j].astype(np.float32))  # fmt: skip
    _save(folder / "stats.safetensors", **stats)
    _save(folder / "top.safetensors", **top)
    _save(folder / "examples.safetensors", **examples)
    if images is not None:
        blobs = [_webp(images[i]) for i in kept]
        start = np.cumsum([0, *map(len, blobs)]).astype(np.int64)
        _save(folder / "thumbnails.safetensors", item=kept, start=start, bytes=np.frombuffer(b"".join(blobs), np.uint8))
    if embeddings is not None:
        _save(folder / "embeddings.safetensors", **{m: np.asarray(e, np.float32) for m, e in embeddings.items()})
    columns = {
        "uid": [f"{i:032x}" for i in range(n)],
        "shard": ["shard-000.tar"] * n,
        "key": [f"{i:06d}" for i in range(n)],
        "caption": list(captions or [""] * n),
        "label": list(labels or [""] * n),
        "half": half.tolist(),
        "copy_of": copy_of,
        **{f"copy_of_{m}": copy_of for m in tokens},
    }
    _save(folder / "views.safetensors", item=kept, view=np.tile(np.float32([0, 0, 1, 1]), (len(kept), 1)))
    pq.write_table(pa.table(columns), folder / ITEMS)
    grids = {m: (grid or {}).get(m, (0, 0)) for m in tokens}
    about = {
        "format": FORMAT,
        "job": {
            "sae": "s" * 32,
            "host": "h" * 32,
            "hint": "test",
            "sites": {},
            "shards": [],
            "seed": seed,
            "pool": "max",
            **of,
        },
        "n_items": n,
        "d_sae": d,
        "modalities": list(tokens),
        "grid": {m: {"rows": r, "cols": c, "places": tokens[m].shape[1], "steps": []} for m, (r, c) in grids.items()},
        "captions": bool(captions),
        "images": images is not None,
        "embedder": {m: "test" for m in embeddings or {}},
        "faults": {},
    }
    (folder / ABOUT).write_text(json.dumps(about))
    assert BINS == len(EDGES) - 1
    return folder


def _histogram(values):
    return np.histogram(np.abs(values).clip(EDGES[0], EDGES[-1]), EDGES)[0].astype(np.int64)


def _save(path, **arrays):
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)


def _webp(image):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(out, "webp", quality=80)
    return out.getvalue()

"""Reading stored activations: rows a second of mmsae's loader, beside a tar with one npy a row, and what a step needs.

    python -m benchmarks.storage [--quick]

Writes a bfloat16 store of pairs of random rows, and a part of them as a webdataset tar, into a temporary folder. Every
contender reads whole passes with warm page cache in batches of 512 pairs; what it read is compared with what was
written first. The step is that of PairedTopK at ratio 8, k 32 on batches of that size.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Options, Result, interleave, parse, quartiles
from benchmarks.methods import Ours, Problem
from mmsae.activations import ActivationStore, StoreLoader, write_store
from mmsae.report.tables import markdown_table

BATCH = 512
Batches = Iterator[dict[str, Tensor]]


def write_tar(path: Path, x: dict[str, Tensor]) -> None:
    """One member a row and modality: ``KEY.MODALITY.npy`` of float16."""
    with tarfile.open(path, "w") as tar:
        for i in range(len(next(iter(x.values())))):
            for m, rows in x.items():
                buffer = io.BytesIO()
                np.save(buffer, rows[i].half().numpy())
                info = tarfile.TarInfo(f"{i:08d}.{m}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)


def from_tar(path: Path, modalities: Sequence[str]) -> Batches:
    """Shuffled batches by webdataset, without workers."""
    import webdataset

    names = [f"{m}.npy" for m in modalities]
    rows = webdataset.WebDataset(str(path), shardshuffle=False).shuffle(1000, seed=0).decode().to_tuple(*names)
    for batch in rows.batched(BATCH):
        yield {m: torch.from_numpy(part) for m, part in zip(modalities, batch, strict=True)}


def from_store(folder: Path, shuffle: bool) -> Batches:
    """Batches as ``mmsae fit`` reads them."""
    for tokens in StoreLoader(ActivationStore(folder, verify=False), BATCH, shuffle=shuffle):
        yield dict(tokens.x)


def read(batches: Callable[[], Batches]) -> int:
    """Read a pass; the number of pairs."""
    return sum(len(next(iter(batch.values()))) for batch in batches())


def pairs(n: int, width: int) -> dict[str, Tensor]:
    """Rows of numbers that bfloat16 and float16 both hold; the first three are the digits of the row's number."""
    g, i = torch.Generator().manual_seed(0), torch.arange(n)
    x = {m: torch.randn(n, width, generator=g).bfloat16().half().float() for m in ("image", "text")}
    for rows in x.values():
        rows[:, :3] = torch.stack([i % 128, i // 128 % 128, i // 128**2], 1)
    return x


def right(batches: Callable[[], Batches], x: dict[str, Tensor]) -> bool:
    """Whether a pass gives rows as they were written, in pairs, none twice, and all but a part of a batch."""
    found = list(batches())
    seen = {m: torch.cat([b[m].float() for b in found]) for m in x}
    at = (seen["image"][:, :3] @ torch.tensor([1.0, 128.0, 128.0**2])).long()
    whole = len(at) > len(x["image"]) - BATCH and len(at.unique()) == len(at)
    return whole and all(torch.equal(seen[m], x[m][at]) for m in x)


def run(options: Options, result: Result, folder: Path) -> bool:
    """Write, check, and time."""
    width, rows, in_tar = (32, 2048, 1024) if options.quick else (512, 100_000, 10_240)
    x = pairs(rows, width)
    write_store(folder / "store", x, dtype="bfloat16", rows_per_shard=50_000)
    part = {m: v[:in_tar] for m, v in x.items()}
    write_tar(folder / "rows.tar", part)
    ways: dict[str, tuple[Callable[[], Batches], dict[str, Tensor]]] = {
        "mmsae, shuffled": (partial(from_store, folder / "store", True), x),
        "mmsae, in order": (partial(from_store, folder / "store", False), x),
        "tar of one npy a row, webdataset": (partial(from_tar, folder / "rows.tar", tuple(x)), part),
    }
    agree = {name: right(*way) for name, way in ways.items()}
    counts = {name: read(batches) for name, (batches, _) in ways.items()}
    step = Ours(Problem("paired_topk", width, 8 * width, 32 if width > 32 else 4, BATCH), "cpu")
    batch = step.problem.rows("cpu")
    counts["step of PairedTopK"] = BATCH
    cpu = Options(**{**vars(options), "device": "cpu"})
    runs = {name: partial(read, batches) for name, (batches, _) in ways.items()}
    timings = interleave(runs | {"step of PairedTopK": partial(step, batch)}, cpu)
    table, rates = [], {}
    for name, timing in timings.items():
        timing.extra = {"pairs": counts[name], "agrees": agree.get(name, True)}
        low, middle, high = quartiles([1e3 * counts[name] / ms for ms in timing.ms])
        rates[name] = middle
        note = "" if agree.get(name, True) else "does not give what was written"
        over = f"{rates['mmsae, shuffled'] / middle:.1f}"
        table.append([name, f"{middle:,.0f} ({low:,.0f} to {high:,.0f})", over, note])
    head = ["", "pairs a second", "mmsae, shuffled, is faster by", ""]
    sizes = {path.name: sum(f.stat().st_size for f in path.rglob("*")) for path in (folder / "store",)}
    sizes["rows.tar"] = (folder / "rows.tar").stat().st_size
    bytes_per_pair = {"store": sizes["store"] / rows, "rows.tar": sizes["rows.tar"] / in_tar}
    table.append(
        ["bytes a pair: store, tar", f"{bytes_per_pair['store']:,.0f}, {bytes_per_pair['rows.tar']:,.0f}", None, ""]
    )
    case = f"pairs of width {width}, {rows:,} in the store, {in_tar:,} in the tar"
    result.add(case, markdown_table(head, table), timings, pairs_per_second=rates, bytes_per_pair=bytes_per_pair)
    return all(agree.values())


def main(args: Sequence[str] | None = None) -> int:
    options = parse(__doc__, args)
    with tempfile.TemporaryDirectory() as folder:
        good = run(options, result := Result("storage", options), Path(folder))
    result.draw()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

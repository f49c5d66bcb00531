"""The merge of a filter job: peak memory and CPU seconds at several numbers of samples, with parts that are generated.

    python -m benchmarks.merge [--rows 1000000 10000000] [--part-rows 10000] [--out runs/benchmarks]

Parts are as ``mmsae filter`` writes them for a CLIP-like host: uid, key, shard, a caption, six numbers, and four
reasons on either side. Each size is merged in a process of its own, which does what the job does: it looks for repeated
uids, keeps the half with the highest score, writes the table, the list of uids and the plan of the output shards, and
summarises all columns. Peak memory is that of the process (``VmHWM``), beside what it had when everything was imported.
``--tars N`` also writes output shards from N input shards of 1,000 samples of 20 kB, by one process and by two, and by
one as workers of Ray and parts of a batch queue do them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Options, environment
from mmsae import partitions
from mmsae.allocator import keep_memory
from mmsae.filtering import columns, merge
from mmsae.filtering.columns import Column, Summary, rank_correlations, read_samples
from mmsae.filtering.reshard import Reshard, in_runs
from mmsae.jobs.duplicates import UidParts
from mmsae.jobs.processes import Local
from mmsae.jobs.units import Share, Work
from mmsae.report.tables import markdown_table
from mmsae.shards import ShardWriter
from mmsae.shards.uids import hex_uids

NUMBERS = ("clip", "clip_centred", "pair_code", "pair_weighted", "l0_image", "l0_text")
REASONS = 4
TAR_SAMPLES, SAMPLE_BYTES = 1000, 20_000


def write_parts(folder: Path, rows: int, part_rows: int) -> None:
    """Parts of the ``score`` pass, with random numbers, reasons and uids."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = [
        f"a photograph of thing {i} beside thing {i * i % 97} on a {i % 7} by {i % 5} field" for i in range(1000)
    ]
    meta = {b"mmsae": json.dumps({"seen": part_rows, "counts": {}, "examples": []}).encode()}
    for i, lo in enumerate(range(0, rows, part_rows)):
        n = min(part_rows, rows - lo)
        cells: dict[str, Any] = {"uid": hex_uids(rng.integers(0, 2**64, (n, 2), np.uint64, endpoint=False))}
        cells |= {"key": [f"{j:09d}" for j in range(lo, lo + n)], "shard": [f"{i:08d}.tar"] * n}
        cells["caption"] = [captions[j] for j in rng.integers(0, 1000, n)]
        cells["words"] = rng.integers(3, 30, n, dtype=np.int32)
        cells |= {name: rng.standard_normal(n, np.float32) for name in NUMBERS}
        for side in ("text_only", "image_only"):
            at = pa.array(np.arange(n + 1, dtype=np.int32) * REASONS)
            latents = pa.array(rng.integers(0, 8192, n * REASONS, dtype=np.int32))
            cells[f"{side}_latents"] = pa.ListArray.from_arrays(at, latents)
            cells[f"{side}_strengths"] = pa.ListArray.from_arrays(at, pa.array(rng.random(n * REASONS, np.float32)))
        pq.write_table(pa.table(cells).replace_schema_metadata(meta), folder / f"{i:06d}.part", compression="zstd")


def peak() -> int:
    """Bytes that this process had at most (``ru_maxrss`` would count those of the process that started it)."""
    said = Path("/proc/self/status").read_text(encoding="ascii")
    return int(said.split("VmHWM:")[1].split()[0]) * 1024


def merged(folder: Path, block: int) -> dict[str, Any]:
    """Merge the parts of a folder in this process; CPU seconds of every step, and memory."""
    keep_memory()  # as a command does
    columns.BLOCK = partitions.ROWS = block
    parts = sorted(folder.glob("*.part"))
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = work()
        seconds[step] = round(time.process_time() - start, 2)
        return found

    pa.set_cpu_count(1)
    before, out, scratch = peak(), folder / "out", folder / "merge"
    out.mkdir()
    uids = UidParts(parts, [p.stem for p in parts], folder)
    repeats = timed("repeated uids", lambda: int(uids.first() is not None))
    samples = timed("columns", lambda: read_samples(parts, scratch))
    b = merge.budget(samples.n, 0.5)
    kept = timed("threshold and order", lambda: merge.keep_best(samples, "pair_weighted", b, scratch))
    label = "#{}".format
    timed("scores.parquet", lambda: merge.write_scores(out / "scores.parquet", parts, samples, kept, label))
    timed("uids.npy", lambda: merge.write_uids(out / "uids.npy", samples, kept, scratch))
    starts = np.array(samples.starts)
    shards = Reshard([], parts, starts, kept.on, scratch / "plan.npy", out, 1000, False, False)
    timed("plan of shards", shards.make_plan)
    timed("summaries", lambda: [Summary(c, on).to_dict() for c in samples.numbers.values() for on in (None, kept.on)])
    timed("rank correlations", lambda: rank_correlations(samples))
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in (out, scratch)}
    sizes["parts"] = sum(p.stat().st_size for p in parts)
    facts = {"rows": samples.n, "parts": len(parts), "kept": kept.n, "repeats": repeats, "shards": shards.shards}
    return facts | {"peak": peak(), "imported": before, "seconds": seconds, "bytes": sizes}


def resharded(folder: Path, tars: int) -> list[dict[str, Any]]:
    """Samples that are written a second, by one process and by two, and where output shards are done one by one.

    Half of the samples is kept. Workers of Ray and parts of a batch queue do them one by one, and so read the input
    shard once more in whose middle an output shard begins.
    """
    rng, paths, parts = np.random.default_rng(0), [], []
    data = rng.bytes(SAMPLE_BYTES)
    with ShardWriter(folder / "in", "s", per_shard=TAR_SAMPLES) as writer:
        for i in range(tars * TAR_SAMPLES):
            writer.write(f"{i:09d}", {"jpg": data, "txt": "a caption", "json": {"uid": f"{i:032x}"}})
    for s in range(tars):
        rows = range(s * TAR_SAMPLES, (s + 1) * TAR_SAMPLES)
        paths.append(str(folder / "in" / f"s-{s:06d}.tar"))
        parts.append(folder / f"{s}.part")
        pq.write_table(pa.table({"uid": [f"{i:032x}" for i in rows], "key": [f"{i:09d}" for i in rows]}), parts[-1])
    kept = Column.write(folder / "kept", bool, iter([rng.random(tars * TAR_SAMPLES) < 0.5]))
    starts, found, n = np.arange(tars + 1) * TAR_SAMPLES, [], int(kept.whole().sum())
    for size, how in ((1, "1 process"), (2, "2 processes"), (1, "1 process, one by one")):
        out, marks = folder / "out", Path(tempfile.mkdtemp(dir=folder))
        job = Reshard(paths, parts, starts, kept, folder / "plan.npy", out, 1000, False, False)
        job.make_plan()
        with Local(size) as engine:
            engine.deal(job.tally, [0] * size, started(0, marks, 1), started, marks, size)
            todo, wall = in_runs(job.missing(), size), time.perf_counter()
            for units in [[u] for u in todo] if "one by one" in how else [todo]:
                engine.deal(job.tally, units, counted(0, job, marks), counted, job, marks)
            wall = time.perf_counter() - wall
        cpu = sum(float(line) for p in marks.glob("cpu-*") for line in p.read_text().splitlines())
        written = sum(f.stat().st_size for f in out.iterdir())
        found.append({"how": how, "samples": n, "wall": wall, "cpu": cpu, "bytes": written})
        shutil.rmtree(out)
    return found


def counted(rank: int, job: Reshard, folder: Path) -> Work:
    """What writes a process's output shards, and the CPU seconds of that into a file."""

    def work(share: Share) -> None:
        start = time.process_time()
        job.work(share)
        with open(folder / f"cpu-{rank}", "a") as file:
            print(time.process_time() - start, file=file)

    return work


def started(rank: int, folder: Path, processes: int) -> Work:
    """What a process does that only starts: it waits until all have imported what they need."""

    def work(share: Share) -> None:
        (folder / f"started-{rank}").touch()
        while len(list(folder.glob("started-*"))) < processes:
            time.sleep(0.05)

    return work


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**6, 10**7], help="samples of every size")
    parser.add_argument("--part-rows", type=int, default=10_000, help="samples in a part")
    parser.add_argument("--block", type=int, default=columns.BLOCK, help="samples in memory at once")
    parser.add_argument("--tars", type=int, default=0, help="input shards that are written anew")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of results")
    parser.add_argument("--merge", type=Path, help="merge the parts of this folder, and print what that took")
    given = parser.parse_args(args)
    if given.merge:
        print(json.dumps(merged(given.merge, given.block)))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"environment": environment(Options(device="cpu")), "sizes": []}
    for rows in given.rows:
        with tempfile.TemporaryDirectory(dir=given.out) as folder:
            write_parts(Path(folder) / "parts", rows, given.part_rows)
            command = [
                sys.executable,
                "-m",
                "benchmarks.merge",
                "--merge",
                f"{folder}/parts",
                "--block",
                str(given.block),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        found["sizes"].append(json.loads(done.stdout.splitlines()[-1]))
        (given.out / "merge.json").write_text(json.dumps(found, indent=1) + "\n")
        print(found["sizes"][-1], flush=True)
    if given.tars:
        with tempfile.TemporaryDirectory(dir=given.out) as folder:
            found["resharded"] = resharded(Path(folder), given.tars)
        (given.out / "merge.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """Figures of every size and of writing output shards, in Markdown."""
    tables = [merge_table(found["sizes"])] if found["sizes"] else []
    return "\n\n".join([*tables, *([reshard_table(found["resharded"])] if "resharded" in found else [])])


def merge_table(sizes: Sequence[dict[str, Any]]) -> str:
    """Memory, seconds and disk of every size."""
    rows = [["peak memory, MiB", *(f"{s['peak'] / 2**20:,.0f}" for s in sizes)],
            ["of it when all was imported", *(f"{s['imported'] / 2**20:,.0f}" for s in sizes)]]  # fmt: skip
    rows += [[f"{step}, CPU s", *(f"{s['seconds'][step]:,.1f}" for s in sizes)] for step in sizes[0]["seconds"]]
    rows.append(["together, CPU s", *(f"{sum(s['seconds'].values()):,.1f}" for s in sizes)])
    rows += [[f"bytes a sample: {k}", *(f"{s['bytes'][k] / s['rows']:,.0f}" for s in sizes)] for k in sizes[0]["bytes"]]
    return markdown_table(["", *(f"{s['rows']:,} samples" for s in sizes)], rows)


def reshard_table(found: Sequence[dict[str, Any]]) -> str:
    """Samples and megabytes that are written a second of the clock and of CPU time."""
    rows = [
        [r["how"], *(f"{n / s:,.0f}" for s in (r["wall"], r["cpu"]) for n in (r["samples"], r["bytes"] / 1e6))]
        for r in found
    ]
    heads = ["samples a second", "MB a second", "samples a CPU second", "MB a CPU second"]
    return markdown_table(["half of the samples is written", *heads], rows)


if __name__ == "__main__":
    sys.exit(main())

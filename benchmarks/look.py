"""``mmsae look`` on photographs of shards, as loose files in a folder for each class.

    python -m benchmarks.look --shards '../shared/data/tiny_imagenet/*.tar.gz' --skip 5000 --out runs/look_real

Defaults of ``mmsae look`` were chosen on the first 5,000 of these; what is skipped is not reported on.
"""

from __future__ import annotations

import argparse
import re
import time
from itertools import islice
from pathlib import Path

from mmsae.look.command import look
from mmsae.options import call
from mmsae.shards import FaultLog, expand, read_shards


def unpack(shards: str, out: Path, skip: int = 0, limit: int | None = None) -> int:
    """Write the images of shards as ``OUT/CLASS/KEY.jpg``, bytes unchanged; returns their number."""
    samples = read_shards(expand(shards), FaultLog(), need=("image",), decode=False)
    n = 0
    for sample in islice(samples, skip, None if limit is None else skip + limit):
        ending = next(e for e in ("jpg", "png", "jpeg", "webp") if e in sample.raw)
        folder = out / re.sub(r"\W+", "_", str(sample.meta.get("class", "none")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample.key}.{ending}").write_bytes(sample.raw[ending])
        n += 1
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/look_real"))
    parser.add_argument("--host", default="lite0")
    parser.add_argument("--skip", type=int, default=0, help="photographs at the beginning that are left out")
    parser.add_argument("--limit", type=int, help="at most so many photographs")
    args = parser.parse_args()
    photographs = args.out / "photographs"
    if not photographs.is_dir():
        print(f"{unpack(args.shards, photographs, args.skip, args.limit):,} photographs in {photographs}")
    start, cpu = time.perf_counter(), time.process_time()
    call(look, str(photographs), str(args.out / "look"), args.host)
    print(f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of them of this process's CPU")


if __name__ == "__main__":
    main()

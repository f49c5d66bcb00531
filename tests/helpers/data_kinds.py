"""The samples of some tars, laid out in every other way in which data may lie."""

import gzip
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmsae.shards import FaultLog, read_shard

KINDS = ("tar.gz", "tar.zst", "images", "parquet")


def laid_out(kind, tars, folder):
    """Write the samples of tars so that each tar is one unit; returns the pattern."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    per_tar = []
    for tar in map(Path, tars):
        if kind.startswith("tar"):
            pack = gzip.compress if kind == "tar.gz" else lambda data: pa.Codec("zstd").compress(data, asbytes=True)
            (folder / f"{tar.name.removesuffix('.tar')}.{kind}").write_bytes(pack(tar.read_bytes()))
            continue
        samples = list(read_shard(tar, FaultLog(), need=(), decode=False))
        per_tar.append(len(samples))
        if kind == "images":
            for s in samples:
                for field in ("png", "txt", "json"):
                    (folder / f"{s.key}.{field}").write_bytes(s.raw[field])
        else:
            columns = {
                "image": [{"bytes": s.raw["png"], "path": None} for s in samples],
                "caption": [s.raw["txt"].decode() for s in samples],
                "__key__": [s.key for s in samples],
                "uid": [s.uid for s in samples],
            }
            pq.write_table(pa.table(columns), folder / f"{tar.stem}.parquet", row_group_size=7)
    return f"{folder}#files={per_tar[0]}" if kind == "images" else str(folder)


def members(paths):
    """``{name: content}`` of all members of some tars."""
    out = {}
    for path in paths:
        with tarfile.open(path) as tar:
            out |= {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    return out

"""Samples whose uid occurs twice, taken out of the parts of a store before they are merged."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from mmsae.activations.spec import shard_stem
from mmsae.activations.writer import StoreWriter, part_meta
from mmsae.jobs.duplicates import UidParts
from mmsae.shards import FaultLog
from mmsae.types import Faults


def drop_duplicates(writer: StoreWriter) -> int:
    """Keep the first sample of every uid, in the order of the units; returns how many others there were.

    A part with others is written anew, and says in its faults which they were. Killed meanwhile, the job goes on: a
    part that is not there is made again, and then loses the same samples. Only one process may do it, when all parts
    are written.
    """
    files = [writer.index_file(unit) for unit in range(writer.units)]
    parts = UidParts(files, [part_meta(f)["source"] for f in files], writer.folder)
    return parts.drop(partial(_rewrite, writer))


def _rewrite(writer: StoreWriter, unit: int, kept: np.ndarray, log: FaultLog) -> None:
    index, meta, new = writer.index_file(unit), part_meta(writer.index_file(unit)), torch.from_numpy(kept)
    table = pq.read_table(index).filter(pa.array(kept))
    cells = {name: table[name].to_pylist() for name in table.column_names}
    tensors = load_file(writer.folder / f"{shard_stem(unit)}.safetensors")
    part = writer.open_part(unit, meta["source"])
    try:
        for site in writer.sites:
            item = tensors.get(f"{site}.item")
            rows = new if item is None else new[item.long()]
            for name, values in tensors.items():
                if name == site or name.rpartition(".")[0] == site:
                    own = values[rows]
                    own = ((new.cumsum(0) - 1)[own.long()]).to(values.dtype) if name == f"{site}.item" else own
                    part.put(name, own)
        part.put_items(cells)
        part.fault(Faults.read(meta["faults"]))
        part.fault(log.take())
        index.unlink()  # it vouches for the tensors, which are replaced first
        part.commit()
    finally:
        part.close()

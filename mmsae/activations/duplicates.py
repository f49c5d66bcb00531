"""Samples whose uid occurs twice, taken out of the parts of a store before they are merged."""

from __future__ import annotations

from itertools import compress

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from mmsae.activations.spec import shard_stem
from mmsae.activations.writer import StoreWriter, part_meta
from mmsae.shards import FaultLog, UidSet
from mmsae.types import Faults


def drop_duplicates(writer: StoreWriter) -> int:
    """Keep the first sample of every uid, in the order of the units; returns how many others there were.

    A part with others is written anew, and says in its faults which they were. Killed meanwhile, the job goes on: a
    part that is not there is made again, and then loses the same samples. Only one process may do it, when all parts
    are written.
    """
    seen, dropped = UidSet(), 0
    for unit in range(writer.units):
        index = writer.index_file(unit)
        table, log = pq.read_table(index), FaultLog(keep=10**6)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        source = part_meta(index)["source"]
        new = seen.new(columns["uid"], columns["key"], [source] * len(table), log)
        if not all(new):
            dropped += len(new) - sum(new)
            _rewrite(writer, unit, {n: list(compress(v, new)) for n, v in columns.items()}, torch.tensor(new), log)
    return dropped


def _rewrite(writer: StoreWriter, unit: int, cells: dict[str, list[str]], new: torch.Tensor, log: FaultLog) -> None:
    index, meta = writer.index_file(unit), part_meta(writer.index_file(unit))
    tensors = load_file(writer.folder / f"{shard_stem(unit)}.safetensors")
    part = writer.open_part(unit, meta["source"])
    try:
        for site in writer.sites:
            item = tensors.get(f"{site}.item")
            rows = new if item is None else new[item.long()]
            for name, values in tensors.items():
                if name == site or name.rpartition(".")[0] == site:
                    kept = values[rows]
                    kept = ((new.cumsum(0) - 1)[kept.long()]).to(values.dtype) if name == f"{site}.item" else kept
                    part.put(name, kept)
        part.put_items(cells)
        part.fault(Faults.read(meta["faults"]))
        part.fault(log.take())
        index.unlink()  # it vouches for the tensors, which are replaced first
        part.commit()
    finally:
        part.close()

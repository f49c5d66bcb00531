"""Writing the kept samples as shards: one task an output shard, done by any process, in any order.

A plan says at which kept sample of which input shard every output shard begins; it comes from the columns of what is
kept and the keys of one part after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from mmsae.files import atomic_file
from mmsae.filtering.columns import Column
from mmsae.jobs.estimate import progress_bar
from mmsae.jobs.tally import Tally
from mmsae.jobs.units import Share, Work
from mmsae.shards import FaultLog, ShardWriter, group_uid, groups
from mmsae.shards.decode import parse_json
from mmsae.shards.group import Group
from mmsae.shards.names import safe_key
from mmsae.types import InputError


class Reshard(NamedTuple):
    """Output shards to be written; plain values, so that they travel to other processes.

    Members are unchanged, and a key that would unpack elsewhere is written as ``safe_key`` says. A shard ends after
    ``per_shard`` samples, or before a key that it has already (data sets often number their keys anew in every tar).
    """

    paths: list[str]  #: Input shards.
    parts: list[Path]  #: Their parts of the ``score`` pass.
    starts: np.ndarray  #: Number of the first sample of each part, and of all of them last.
    kept: Column | None  #: Which samples are kept; None: all.
    #: File of the plan: ``(shards + 1, 3)`` part, number among its kept samples, and number among all that are kept.
    plan: Path
    out: Path  #: Folder of the output shards.
    per_shard: int  #: Samples in one.
    compress: bool  #: Whether they are ``.tar.gz``.
    progress: bool  #: Whether to show a bar.

    def _kept(self, part: int, columns: Sequence[str]) -> list[tuple[str, ...]]:
        """Columns of the kept samples of a part."""
        lo, hi = int(self.starts[part]), int(self.starts[part + 1])
        on = np.ones(hi - lo, bool) if self.kept is None else self.kept.part(lo, hi)
        if not on.any():  # such a part may lack the columns
            return []
        table = pq.read_table(self.parts[part], columns=list(columns)).filter(on)
        return list(zip(*(table[c].to_pylist() for c in columns), strict=True))

    def make_plan(self) -> None:
        """Write the plan."""
        begins, keys, n = [], set(), 0
        for part in range(len(self.parts)):
            for i, (name,) in enumerate(self._kept(part, ["key"])):
                key = safe_key(name)
                if not begins or len(keys) == self.per_shard or key in keys:
                    begins.append((part, i, n))
                    keys = set()
                keys.add(key)
                n += 1
        with atomic_file(self.plan) as path, open(path, "wb") as file:
            np.save(file, np.array([*begins, (len(self.parts), 0, n)], np.int64))

    @property
    def shards(self) -> int:
        """Number of output shards."""
        return len(np.load(self.plan, mmap_mode="r")) - 1

    @property
    def tally(self) -> Tally:
        """Which output shards are there."""
        names = [f"kept-{i:06d}.tar" + ".gz" * self.compress for i in range(self.shards)]
        return Tally(self.out, names, names)

    def missing(self) -> list[int]:
        """Output shards that are not there; one that is there is whole."""
        self.out.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(r"kept-(\d{6,})\.tar" + (r"\.gz" if self.compress else ""))
        there = {int(found[1]) for p in self.out.iterdir() if (found := pattern.fullmatch(p.name))}
        return [i for i in range(self.shards) if i not in there]

    def work(self, share: Share) -> None:
        """Write the output shards of a share; neighbours are written from one pass over their input shards."""
        plan, source, at = np.load(self.plan, mmap_mode="r"), None, None
        with progress_bar("write shards", "shard", self.progress and share.lead, len(share.units)) as bar:
            for unit in share.units:
                if share.stopped():
                    return
                begin, end = (tuple(map(int, plan[i])) for i in (unit, unit + 1))
                if source is None or at != begin:
                    source = self._samples(*begin[:2])
                with ShardWriter(self.out, "kept", self.per_shard, self.compress) as writer:
                    writer.n = unit * self.per_shard  # it numbers its shards by this
                    for _ in range(end[2] - begin[2]):
                        group = next(source)
                        fields = {group.spelled[field]: data for field, data in group.raw.items()}
                        writer.write(safe_key(group.key), fields)
                at = end
                bar.update()

    def _samples(self, part: int, first: int) -> Iterator[Group]:
        """The kept samples from a place on.

        Raises:
            InputError: An input shard does not hold those that it held.
        """
        for p in range(part, len(self.parts)):
            wanted = self._kept(p, ["key", "uid"])[first if p == part else 0 :]
            if not wanted:
                continue
            at = 0
            for group in groups(self.paths[p], FaultLog()):
                if at == len(wanted):
                    break
                if group.key != wanted[at][0]:
                    continue
                meta = parse_json(group.raw["json"])[0] if "json" in group.raw else None
                if group_uid(self.paths[p], group, meta or {}) == wanted[at][1]:
                    at += 1
                    yield group
            if at < len(wanted):
                raise InputError(
                    f"{self.paths[p]} has changed since it was scored: {len(wanted) - at} of its samples are not in it"
                )


def write_elsewhere(rank: int, job: Reshard) -> Work:
    """What writes a process's output shards."""
    return job.work


def in_runs(units: Sequence[int], processes: int) -> list[int]:
    """Units in an order in which an engine that deals them out in turn gives each process neighbours."""
    dealt, size = np.empty(len(units), np.int64), max(1, min(processes, len(units)))
    for r, run in enumerate(np.array_split(np.asarray(units, np.int64), size)):
        dealt[r::size] = run
    return dealt.tolist()

"""The job of ``mmsae export``: a pass for the samples of a list, then one for the shards of those."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmsae.files import write_json
from mmsae.filtering.passes import META, part_faults, without_duplicates
from mmsae.filtering.reshard import Reshard, in_runs, write_elsewhere
from mmsae.jobs.duplicates import UidParts
from mmsae.jobs.estimate import progress_bar
from mmsae.jobs.folder import JobFolder
from mmsae.jobs.units import Engine, Parts, Share, Work, do_missing
from mmsae.shards import FaultLog, UidList, expand, identity, read_shard, shard_name
from mmsae.shards.uids import taken_already
from mmsae.types import InputError

RESULTS, PLAN = "results.json", "plan.npy"


class Listing(NamedTuple):
    """A pass over shards for the samples of a list; plain values, so that it travels to other processes."""

    paths: list[str]  #: All shards.
    folder: str  #: Folder of the job.
    keep: UidList  #: The list.
    progress: bool  #: Whether to show a bar.

    @property
    def parts(self) -> Parts:
        """A parquet file a shard: ``uid`` and ``key`` of its listed samples."""
        return Parts(Path(self.folder) / "listed", self.paths)

    def work(self, share: Share) -> None:
        """Write the parts of a share."""
        parts = self.parts
        with progress_bar("find listed", "tar", self.progress and share.lead, len(share.units)) as bar:
            for i in share.units:
                if share.stopped():
                    return
                log, unit = FaultLog(), parts.units[i]
                found = [(s.uid, s.key) for s in read_shard(unit.path, log, need=(), decode=False, keep=self.keep)]
                columns = {
                    name: pa.array([row[j] for row in found], pa.string()) for j, name in enumerate(("uid", "key"))
                }
                table = pa.table(columns).replace_schema_metadata({META: json.dumps(log.to_dict()).encode()})
                parts.write(unit, lambda path, table=table: pq.write_table(table, path, compression="zstd"))
                bar.update()


def list_elsewhere(rank: int, job: Listing) -> Work:
    """What lists a process's shards."""
    return job.work


class ExportJob:
    """A job that can be begun. Arguments are those of :func:`mmsae.filtering.export.export`.

    Raises:
        InputError: A shard, the list or the folder is not usable.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        keep: str,
        out: str | Path,
        per_shard: int = 1000,
        compress: bool = False,
        duplicates: str = "refuse",
        progress: bool = True,
    ) -> None:
        paths, listed = expand(shards), UidList(keep)
        job = {"shards": identity(paths), "uids": listed.hash, "per_shard": per_shard, "compress": compress}
        self.folder = JobFolder(out, job, "mmsae export", result=RESULTS, beside=True)
        self.listing = Listing(paths, str(self.folder.work), listed, progress)
        self.per_shard, self.compress, self.duplicates = per_shard, compress, duplicates

    def run(self, engine: Engine) -> Path:
        """Do the job, or what is left of it, in each process of an engine; returns the result's folder."""
        folder, listing = self.folder, self.listing
        if folder.finished:
            if engine.lead and listing.progress:
                print(f"{folder.out}: finished before; nothing to do")
            return folder.out
        with folder.under(engine):
            if engine.lead:
                folder.draft.mkdir(parents=True, exist_ok=True)
            engine.wait()  # the folder is there, and the leader's, before any other works
            do_missing(engine, listing.parts.tally, listing.work, list_elsewhere, listing)
            engine.merge((folder.work / PLAN).exists, self._plan)
            shards = self._shards()
            if todo := engine.agree(shards.missing):
                shards.tally.note()
                engine.run(shards.tally, in_runs(todo, engine.size), shards.work, write_elsewhere, shards)
            engine.merge(lambda: False, lambda: self._finish(shards))
        return folder.out

    def _shards(self) -> Reshard:
        """The output shards, of all samples that the parts have now."""
        listing, parts = self.listing, self.listing.parts.files()
        starts = UidParts(parts, [], self.folder.work).starts
        return Reshard(listing.paths, parts, starts, None, self.folder.work / PLAN, self.folder.draft, self.per_shard,
                       self.compress, listing.progress)  # fmt: skip

    def _plan(self) -> None:
        """See that every uid is there once, and plan the output shards, unless that is done."""
        if (self.folder.work / PLAN).exists():
            return
        listing, parts = self.listing, self.listing.parts.files()
        uids = UidParts(parts, [shard_name(p) for p in listing.paths], self.folder.work)
        if self.duplicates == "drop":
            uids.drop(lambda i, new, log: without_duplicates(parts[i], new, log))
        elif twice := uids.first():
            raise InputError(taken_already(twice.uid, twice.where, twice.first, twice.key))
        shards = self._shards()
        if not shards.starts[-1]:
            raise InputError(f"none of the {len(listing.keep)} uids of {listing.keep.path} is in the shards")
        shards.make_plan()

    def _finish(self, shards: Reshard) -> None:
        listing, log, n, written = self.listing, FaultLog(), int(shards.starts[-1]), shards.shards
        for part in shards.parts:
            log.merge(FaultLog.from_dict(part_faults(part)).take())
        found = log.n_seen - log.counts["duplicate"]
        results = {"samples": n, "written_shards": written}
        results["uids"] = {"listed": len(listing.keep), "not_seen": max(0, len(listing.keep) - found)}
        write_json(self.folder.draft / RESULTS, results | {"faults": log.to_dict(), "job": self.folder.job})
        if listing.progress:
            print(log.summary())
            print(listing.keep.said(found))
            print(f"{n} samples in {written} shards: {self.folder.out}")
        self.folder.publish()

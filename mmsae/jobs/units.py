"""Units of work of a long job: one input tar is one unit, and one unit is one part file, whole or not there.

So a killed job goes on where it stopped, and its result depends neither on kills nor on ranks or workers.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from mmsae.files import atomic_file, disk_errors
from mmsae.shards.sources import shard_name

Part = bytes | Callable[[Path], None]
"""The content of a part file, or a function that writes it to the path it is given."""


class Unit(NamedTuple):
    """One input tar of a job.

    Attributes:
        index: Its place in the job; parts are merged in this order.
        path: The tar, as it was given.
        name: Name of its part file without the suffix: place, file name, and a hash of name and size in bytes, so
            that the part of a shard that was replaced since is not taken for its part.
    """

    index: int
    path: str
    name: str


def units(paths: Sequence[str]) -> list[Unit]:
    """The units of a job over these shards, in this order."""
    made = []
    for i, path in enumerate(paths):
        tag = blake2b(f"{shard_name(path)}\0{os.path.getsize(path)}".encode(), digest_size=4).hexdigest()
        made.append(Unit(i, path, f"{i:06d}-{os.path.basename(path).split('.')[0]}-{tag}"))
    return made


def part_path(out: str | Path, unit: Unit, suffix: str = ".part") -> Path:
    """Where the part of a unit is."""
    return Path(out) / (unit.name + suffix)


def done(out: str | Path, unit: Unit, suffix: str = ".part") -> bool:
    """Whether the part of a unit is there; if it is, it is whole."""
    return part_path(out, unit, suffix).exists()


def write_part(out: str | Path, unit: Unit, part: Part, suffix: str = ".part") -> Path:
    """Write the part of a unit under a temporary name, then rename it.

    Raises:
        InputError: If the disk is full; nothing is left behind.
    """
    target = part_path(out, unit, suffix)
    for killed in target.parent.glob(f".{glob.escape(target.name)}.tmp*"):  # a unit has one owner, so nobody writes it
        killed.unlink()
    with disk_errors(target), atomic_file(target) as temporary:
        temporary.write_bytes(part) if isinstance(part, bytes) else part(temporary)
    return target


def run_units(
    paths: Sequence[str],
    out: str | Path,
    work: Callable[[str], Part],
    *,
    suffix: str = ".part",
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    desc: str = "shards",
) -> list[Path]:
    """Do this rank's share of the units that are not done yet.

    Unit i belongs to rank ``i % world``; more ranks than units is allowed. No rank waits for another here: put a
    barrier with a long timeout between this and the merge.

    Args:
        paths: The shards of the whole job.
        out: Folder of the part files.
        work: Gives the part of the shard at a path: bytes, or a function that writes it to a path.
        suffix: Of the part files.
        rank: This process.
        world: Number of processes.
        progress: Whether to show a progress bar.
        desc: Its label.

    Returns:
        The parts of the whole job in order, those of other ranks included whether or not they are there yet.
    """
    from tqdm import tqdm

    job = units(paths)
    mine = job[rank::world]
    todo = [u for u in mine if not done(out, u, suffix)]
    bar = tqdm(todo, desc=desc, unit="tar", total=len(mine), initial=len(mine) - len(todo), disable=not progress)
    for unit in bar:
        write_part(out, unit, work(unit.path), suffix)
    return [part_path(out, unit, suffix) for unit in job]

"""The undecoded samples of a unit of any kind."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mmsae.shards.faults import FaultLog
from mmsae.shards.folder import folder_groups
from mmsae.shards.group import Group
from mmsae.shards.shard import as_shard
from mmsae.shards.table import table_groups
from mmsae.shards.tar import tar_groups


def groups(path: str | os.PathLike[str], faults: FaultLog, read: bool = True) -> Iterator[Group]:
    """The samples of a unit, whatever it is: see ``tar_groups``, ``folder_groups`` and ``table_groups``.

    ``faults`` counts what is wrong with the unit itself; whole samples are for the caller to count. Without ``read``
    contents are left out, and as little as possible is read.
    """
    shard = as_shard(path)
    made = {"tar": tar_groups, "images": folder_groups, "table": table_groups}[shard.kind]
    return made(shard, faults, read)

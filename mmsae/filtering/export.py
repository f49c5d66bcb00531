"""``mmsae export``: shards of the samples of a list."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export(
    shards: str | list[str],
    keep: str,
    out: str,
    per_shard: int = 1000,
    compress: bool = False,
    duplicates: Literal["refuse", "drop"] = "refuse",
    devices: int = 1,
    progress: bool = True,
) -> Path:
    """Write the samples of a list as shards, their members unchanged, in the order of the input.

    No host and no SAE is needed, and no image is decoded. OUT holds kept-NNNNNN.tar and results.json. The same command
    goes on after a kill; run again after it ended, it does nothing. (``fit``, ``extract`` and ``filter`` take the list
    itself, so that shards of their own are needed by other programs only, or where a list keeps few of many.)

    Args:
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or several
            (docs/how-to/data.md).
        keep: File of uids (``uids.npy`` of ``mmsae filter``, or DataComp's).
        out: Folder of the result; it appears when everything is done.
        per_shard: Samples in a written shard.
        compress: Write ``.tar.gz``.
        duplicates: What happens where a uid occurs twice: ``refuse`` ends the job; ``drop`` keeps the first in the
            order of the shards.
        devices: Number of processes.
        progress: Whether to print what is done and show bars.

    Returns:
        The folder of the result.

    Raises:
        InputError: A shard, the list or the folder is not usable, or no sample is listed; one sentence says why.
    """
    from mmsae.filtering.listing import ExportJob
    from mmsae.jobs.processes import Local
    from mmsae.options import at_least

    at_least(1, per_shard=per_shard, devices=devices)
    with Local(devices) as engine:
        return ExportJob(shards, keep, out, per_shard, compress, duplicates, progress).run(engine)

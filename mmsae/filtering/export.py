"""``mmsae export``: shards of the samples of a list."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mmsae.options import Run, Spread, at_least, side_by_side


@side_by_side
def export(
    shards: str | list[str],
    keep: str,
    out: str,
    per_shard: int = 1000,
    compress: bool = False,
    duplicates: Literal["refuse", "drop"] = "refuse",
    progress: bool = True,
    spread: Spread = Spread(),
) -> Path | None:
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
        progress: Whether to print what is done and show bars.
        spread: Who does the work; no device is used, and a worker under Ray takes one CPU.

    Returns:
        The folder of the result; None where other parts of the job have to go on.

    Raises:
        InputError: A shard, the list or the folder is not usable, or no sample is listed; one sentence says why.
    """
    from mmsae.filtering.listing import ExportJob
    from mmsae.jobs.engines import engine_of

    at_least(1, per_shard=per_shard)
    with engine_of(spread, Run(device="cpu", progress=progress)) as engine:
        return ExportJob(shards, keep, out, per_shard, compress, duplicates, progress).run(engine)
    return None

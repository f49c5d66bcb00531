"""``mmsae filter``: from image-text shards to the shards of the samples worth keeping, with the reasons."""

from __future__ import annotations

from pathlib import Path

from mmsae.filtering.options import Keeping, Scoring
from mmsae.options import SAERun, Spread, UniqueData


def filter_command(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str = "",
    scoring: Scoring = Scoring(),
    keeping: Keeping = Keeping(),
    run: SAERun = SAERun(),
    data: UniqueData = UniqueData(),
    spread: Spread = Spread(),
) -> Path | None:
    """Score image-text samples, keep a share of them, and say what is wrong with the others.

    OUT holds scores.parquet (every sample with all scores, whether it is kept, and the concepts that only its text or
    only its image has), uids.npy (DataComp's list of the kept), shards/kept-*.tar (members unchanged), pair_weights.*
    (what was fitted), results.json and report.html. The same command goes on after a kill; run again after it ended, it
    does nothing.

    Args:
        sae: SAE folder or hub id.
        shards: What to filter: path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL,
            or a list of them (docs/how-to/data.md).
        out: Folder of the result; it appears when everything is done.
        host: Name of the host (``local-dir:DIR``, ``ViT-B-32/laion2b_s34b_b79k``, ...). Default: the one that the SAE
            was trained on, where that can be found again.
        scoring: How samples are scored.
        keeping: Which samples are kept.
        run: Where and how the host and the SAE compute.
        data: What is made of the samples' files.
        spread: Who does the work.

    Returns:
        The folder of the result; None where other parts of the job have to go on.

    Raises:
        InputError: An argument, a shard, the SAE or the folder is not usable; one sentence says why.
    """
    from mmsae.filtering.job import FilterJob
    from mmsae.jobs.engines import engine_of

    with engine_of(spread, run) as engine:
        return FilterJob(sae, shards, out, host, scoring, keeping, run, data, engine).run()
    return None

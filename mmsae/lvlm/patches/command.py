"""``mmsae patches``: the patch filter over shards, tar by tar, with a table and a plot."""

from __future__ import annotations

from typing import Any

from mmsae.lvlm.options import PatchChoice
from mmsae.options import OneProcessRun, Shards, Spread, at_least


def patches(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str = "",
    weights: str | None = None,
    choice: PatchChoice = PatchChoice(),
    run: OneProcessRun = OneProcessRun(batch_size=8),
    data: Shards = Shards(),
    spread: Spread = Spread(),
) -> dict[str, Any] | None:
    """Black out the patches with the lowest scores and ask again: which score knows what the model needs?

    Args:
        sae: SAE folder or hub id, trained on image and text tokens of a vision-language model.
        shards: Images with ``question`` and ``answer`` in their json.
        out: Folder to write: results.json and patches.png. The same command goes on where it was stopped.
        host: Name of the host; default: the SAE's own.
        weights: Folder of ``mmsae weights``, needed for ``cos``.
        choice: Which patches go black, and what is asked then.
        run: Device, precision and batch size, and what is said.
        data: What is made of the samples' files.
        spread: Who does the work.

    Returns:
        ``{shown: {"accuracy", "error"}}`` under ``table``, and the folder as ``out``; None where other parts of the job
        have to go on.
    """
    from mmsae.jobs.engines import engine_of
    from mmsae.lvlm.patches.patch_filter import filter_patches

    at_least(1, batch_size=run.batch_size)
    with engine_of(spread, run) as engine:
        return filter_patches(sae, host, weights, choice, shards, out, run, data.fault_limit, engine)
    return None

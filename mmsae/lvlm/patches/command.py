"""``mmsae patches``: the patch filter over shards, tar by tar, with a table and a plot."""

from __future__ import annotations

from typing import Any

from mmsae.lvlm.options import PatchChoice
from mmsae.options import OneProcessRun, Shards, at_least


def patches(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str = "",
    weights: str | None = None,
    choice: PatchChoice = PatchChoice(),
    run: OneProcessRun = OneProcessRun(batch_size=8),
    data: Shards = Shards(),
) -> dict[str, Any]:
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

    Returns:
        ``{shown: {"accuracy", "error"}}`` under ``table``, and the folder as ``out``.
    """
    from mmsae.load import load_pair
    from mmsae.lvlm.patches.patch_filter import PatchFilter, filter_patches
    from mmsae.lvlm.tokens import named_lvlm
    from mmsae.lvlm.weights.file import load_weights

    at_least(1, batch_size=run.batch_size)
    model, name = named_lvlm(sae, host)
    choice.check(weights is not None)
    model, loaded = load_pair(model, name, run.device, run.precision, run.allow_other_site)
    file = None if weights is None else load_weights(weights)
    if file is not None:
        file.check(model, loaded.fingerprint)
    return filter_patches(PatchFilter(loaded, model, choice, file), shards, out, run, data.fault_limit)

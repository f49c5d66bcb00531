"""``mmsae evidence``: what the latents of an SAE fire on in a corpus."""

from __future__ import annotations

from typing import Any

from mmsae.interpret.evidence.options import Evidencing
from mmsae.options import Data, Drawing, SAERun, Spread


def evidence(
    sae: str | list[str],
    shards: str | list[str],
    out: str | list[str],
    host: str = "",
    choice: Evidencing = Evidencing(),
    run: SAERun = SAERun(),
    data: Data = Data(),
    spread: Spread = Spread(),
    drawing: Drawing = Drawing(),
) -> dict[str, Any] | str | None:
    """Collect what every latent fires on: statistics, top items, examples of all strengths, negatives, maps.

    All that names, scores, browses and analyses latents reads OUT. Run again after a kill, it goes on.

    Args:
        sae: SAE folder or hub id; of several of the same sites (an SAE and its controls) the host reads the data once.
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or several
            (docs/how-to/data.md); for SAEs of texts and of denoisers also a .txt file with a caption a line.
        out: Folder to write; one for each SAE.
        host: Name of the host; default: the SAE's own.
        choice: What is kept of every latent.
        run: Where and how host and SAE compute.
        data: What is made of the samples' files.
        spread: Who does the work.
        drawing: How a text-to-image host draws captions, for an SAE of its denoiser.

    Returns:
        ``evidence.json``, with the folder as ``out``; of several SAEs the folders; None where other parts of the job
        have to go on.
    """
    from mmsae.interpret.evidence.job import collect_evidence

    found = collect_evidence(sae, shards, out, host, choice, run, data, spread, drawing)
    return "\n".join(about["out"] for about in found) if isinstance(found, list) else found

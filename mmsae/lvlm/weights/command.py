"""``mmsae weights``: cross-modal weights of an SAE on a vision-language host, and what its latents fire on."""

from __future__ import annotations

from typing import Any

from mmsae.lvlm.options import RUN, Definition, TokenSample
from mmsae.options import SAERun, Shards, Spread


def weights(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str = "",
    latents: tuple[int, ...] = (),
    names: str | None = None,
    definition: Definition = Definition(),
    sample: TokenSample = TokenSample(),
    run: SAERun = RUN,
    data: Shards = Shards(),
    spread: Spread = Spread(),
) -> dict[str, Any] | None:
    """Cross-modal weights of every latent: are its strongest text and image tokens alike?

    OUT holds latent_weights.safetensors and weights.json, top_tokens.parquet (the strongest tokens of every latent) and
    gallery.html, which shows some of them on their images and in their sentences. Run again after a kill, it goes on.

    Args:
        sae: SAE folder or hub id, trained on image and text tokens of a vision-language model.
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or several
            (docs/how-to/data.md).
        out: Folder to write.
        host: Name of the host (``lvlm:FOLDER`` or ``lvlm:HUB_ID``); default: the SAE's own.
        latents: Latents that gallery.html is to show first; where the weights are there already, the page alone is
            written anew.
        names: names.json of mmsae name: what latents are called on the page, which alone it changes.
        definition: What the weight of a latent is.
        sample: Which tokens are looked at.
        run: Device, precision, batch size and workers, and what is said.
        data: What is made of the samples' files.
        spread: Who does the work.

    Returns:
        ``weights.json``, with the folder as ``out``; None where other parts of the job have to go on.
    """
    from mmsae.jobs.engines import engine_of
    from mmsae.lvlm.weights.job import cross_modal_weights

    with engine_of(spread, run) as engine:
        return cross_modal_weights(host, sae, shards, out, definition, sample, run, data, latents, engine, names)
    return None

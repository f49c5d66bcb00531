"""``mmsae extract``: run a frozen host over image-text shards and store what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mmsae.options import ListedData, Run, Spread


def extract_command(
    host: str,
    shards: str | list[str],
    out: str,
    sites: str | list[str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    text: Literal["question", "question+answer"] = "question",
    gradient: Literal["", "contrastive", "classifier", "lm", "diffusion"] = "",
    resize: Literal["host", "device"] = "host",
    spread: Spread = Spread(),
    run: Run = Run(),
    data: ListedData = ListedData(),
) -> Path | None:
    """Store a host's activations of all samples of some shards.

    Run again after a kill, it goes on; run again after it ended, it does nothing.

    Args:
        host: An open_clip name with its weights (``ViT-B-32/laion2b_s34b_b79k``), ``hf-hub:ID``, ``local-dir:DIR``,
            ``timm:NAME``, ``timm:local-dir:DIR``, ``transformers:ID-or-FOLDER``, ``lvlm:ID-or-FOLDER``,
            ``diffusers:ID-or-FOLDER`` (its text encoders, on captions), or ``module:IMPORT.PATH:FUNCTION``.
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or several
            (docs/how-to/data.md).
        out: The store to write.
        sites: Where to read; default: the embeddings of every modality of the host. ``image.embed``, ``text.pooled``
            or ``MODULE.PATH:io[tokens]``, or several, which are stored from one forward pass.
        dtype: ``float32`` (exact), ``bfloat16`` or ``float16`` (half the disk; a float16 overflow is refused).
        text: What vision-language hosts read: ``question``: json's ``question`` (else the caption), the answer's turn
            empty; ``question+answer``: whole conversations.
        gradient: Loss of the host whose gradient at every row is stored beside it (g-SAE): ``contrastive`` (image-text
            hosts; the items of a batch are each other's negatives), ``classifier`` (the host's own head; samples need
            ``cls``), ``lm`` (vision-language hosts) or ``diffusion`` (text-to-image hosts like Stable Diffusion 1.x; an
            item's noise depends on its uid). Not with fp16, in which gradients underflow.
        resize: ``host``: images are resized by the host's own transform, in the workers; ``device``: on the host's
            device, which has other bits. The first batch is compared with the host's own transform, and what is too far
            from it is refused.
        spread: Who does the work.
        run: Where and how the host computes.
        data: What is made of the samples' files.

    Returns:
        The folder of the finished store; None where other parts of the job have to go on.
    """
    from mmsae.activations.extract import extract

    return extract(
        host, shards, out, sites=sites, dtype=dtype, text=text, gradient=gradient, resize=resize, spread=spread,
        run=run, data=data,
    )  # fmt: skip

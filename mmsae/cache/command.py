"""``mmsae extract``: extraction with arguments that a command line can give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsae.cache.extract import extract


def extract_command(
    host: str, shards: str | list[str], out: str, sites: str | list[str] | None = None, **options: Any
) -> Path:
    """Store a host's activations of all samples of some shards; see :func:`mmsae.cache.extract`.

    Args:
        host: An open_clip name with its weights (``ViT-B-32/laion2b_s34b_b79k``), ``hf-hub:ID``, ``local-dir:DIR``,
            ``timm:NAME``, ``timm:local-dir:DIR``, ``lvlm:ID-or-FOLDER``, or ``diffusers:ID-or-FOLDER`` (its text
            encoders, on captions).
        shards: Path, folder, glob or brace pattern of tars, or several.
        out: The store to write.
        sites: Where to read; default: the embeddings of every modality of the host. ``image.embed``, ``text.pooled``
            or ``MODULE.PATH:io[tokens]``, or several.
        **options: The other arguments of ``extract``.

    Returns:
        The folder of the finished store.
    """
    return extract(host, shards, out, sites=sites, **options)

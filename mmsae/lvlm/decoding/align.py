"""``mmsae align``: a store of pooled states to one of aligned states, on which VL-SAE trains as on any store."""

from __future__ import annotations

from dataclasses import replace

from mmsae.errors import InputError


def align(store: str, aligner: str, out: str) -> str:
    """Write the aligned states of a store of paired, pooled states; they fit in memory.

    Args:
        store: Store of ``[image_mean]`` and ``[text_mean]`` states.
        aligner: Folder, or a published ``llava_aux_best.pt``.
        out: Store to write.

    Returns:
        The new store.

    Raises:
        InputError: The store lacks a modality, or its widths are not the aligner's.
    """
    import torch

    from mmsae.activations import ActivationStore
    from mmsae.activations.memory import write_store
    from mmsae.lvlm.decoding.concept import aligned_host
    from mmsae.sae.aligner import Aligner
    from mmsae.types import IMAGE, TEXT

    source, maps = ActivationStore(store), Aligner.from_pretrained(aligner)
    if set(source.modalities) != {IMAGE, TEXT}:
        raise InputError(f"{store} holds {', '.join(source.modalities)}; aligning needs image and text")
    x = {}
    for m in (IMAGE, TEXT):
        states = source.load(modality=m)
        if states.shape[1] != maps.d_in[m]:
            raise InputError(f"{store} has {m} states of width {states.shape[1]}, the aligner takes {maps.d_in[m]}")
        with torch.no_grad():
            x[m] = torch.cat([maps.align(part, m) for part in states.split(8192)])
    sites = {m: replace(s, host=aligned_host(s.host, maps), width=maps.width) for m, s in source.sites.items()}
    return str(write_store(out, x, source.uids, sites=sites, keys=source.keys, captions=source.captions))

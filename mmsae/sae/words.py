"""SAEs that nobody trains: latents are words, as a contrastive host embeds them (SpLiCE, arXiv 2402.10376)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.sae.encoder import SAEEncoder
from mmsae.sae.normaliser import Normaliser
from mmsae.sae.sae import SAE
from mmsae.sae.variants.splice import FrozenDictionary, LassoEncoder
from mmsae.types import IMAGE, TEXT, InputError

WORDS = 512  # embedded at a time


@torch.no_grad()
def word_atoms(host: Any, words: Sequence[str]) -> Tensor:
    """``(len(words), d)`` atoms: text embeddings of norm 1, less their mean, brought to norm 1 again.

    Raises:
        InputError: A host without text.
    """
    if TEXT not in host.modalities:
        raise InputError(f"words are embedded by a host with text, which {host.hint} has not")
    parts = [words[i : i + WORDS] for i in range(0, len(words), WORDS)]
    unit = F.normalize(torch.cat([host.encode_text(host.tokenize(list(part))).cpu().float() for part in parts]), dim=1)
    return F.normalize(unit - unit.mean(0), dim=1)


def splice(
    host: Any,
    words: Sequence[str],
    rows: Mapping[str, Tensor] | Tensor,
    encoder: SAEEncoder | None = None,
) -> SAE:
    """An SAE whose latents are words: no training, only the mean of the modality is fitted.

    Args:
        host: A contrastive host (:func:`mmsae.load_host`).
        words: One latent each, in this order; distinct. Published: the 10,000 most frequent words of LAION's captions.
        rows: ``(N, d)`` image embeddings that the mean is taken of, or such of several modalities by name.
        encoder: What codes; default: :class:`LassoEncoder` with the published constants.

    Raises:
        InputError: Words that are no names, or a host without text.
    """
    if len(set(words)) != len(words) or len(words) < 2 or not all(words):
        raise InputError(f"words must be distinct and at least two, not {len(words)} with {len(set(words))} distinct")
    atoms = word_atoms(host, words)
    rows = {IMAGE: rows} if isinstance(rows, Tensor) else dict(rows)
    dictionary = FrozenDictionary(max(len(word.encode()) for word in words))
    normaliser = Normaliser(unit_in=True, centre=True, unit_out=True)
    sae = SAE(None, len(words), None, list(rows), normaliser, encoder or LassoEncoder(), None, {"shared": dictionary})
    sae.build(atoms.shape[1])
    dictionary.fill_(atoms, list(words))
    sae.normaliser.fit(rows)
    sae.fresh = False
    sae.attach(host)
    return sae.eval()

"""Outputs of an SAE with given codes, for loss terms that compare the two codes of a pair."""

from __future__ import annotations

import torch

from mmsae import SAE
from mmsae.sae import AffineEncoder, Dictionary, LossContext, PerModalityEncoder, ReLU
from mmsae.types import Codes, SAEOutput
from tests.helpers.recipes import batch

NAMES = ("image", "text", "audio")


def as_codes(z, sparse=True) -> Codes:
    """Codes with the values of a dense matrix; sparse ones hold the zeros too, in another order in every row."""
    z = torch.as_tensor(z, dtype=torch.float32)
    if not sparse:
        return Codes(z, None, z.shape[1])
    order = torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    return Codes(z.gather(1, order), order, z.shape[1])


def outputs_of(*z, sparse=True) -> dict[str, SAEOutput]:
    """Outputs whose codes are given, and whose rows are not."""
    return {m: SAEOutput(None, as_codes(v, sparse), None, None) for m, v in zip(NAMES, z, strict=False)}


def context(d_sae: int, modalities=("image", "text"), **kw) -> LossContext:
    """A context whose SAE has rows of variance 1."""
    sae = SAE(8, d_sae, modalities=modalities, selector=ReLU())
    for m in modalities:
        sae.normaliser.variance(m).fill_(1.0)
    return LossContext(sae, **kw)


def random_codes(n=40, d_sae=12, k=3, seed=0) -> torch.Tensor:
    """``(n, d_sae)`` with k positive values a row."""
    g = torch.Generator().manual_seed(seed)
    at = torch.rand(n, d_sae, generator=g).topk(k).indices
    return torch.zeros(n, d_sae).scatter(1, at, torch.rand(n, k, generator=g) + 0.2)


def streams(selector, encoder=None, d_in=16, n=2):
    """An SAE in training with an encoder and a dictionary for each of n modalities."""
    torch.manual_seed(0)
    names = NAMES[:n]
    sae = SAE(
        d_in, 48, modalities=names, selector=selector, encoder=PerModalityEncoder(encoder or AffineEncoder()),
        dictionaries={m: Dictionary() for m in names},
    )  # fmt: skip
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    return sae.train()

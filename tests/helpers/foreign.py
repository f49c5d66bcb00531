"""SAEs of every kind that other libraries know, with weights that give the rows a few codes each."""

from __future__ import annotations

import torch

from mmsae import SAE
from mmsae.sae import (
    AffineEncoder,
    BatchTopK,
    Dictionary,
    FeatureChoice,
    GatedEncoder,
    GroupMax,
    JumpReLU,
    Normaliser,
    PursuitEncoder,
    ReLU,
    TopK,
)

D, F = 12, 48
KINDS = {
    "relu": lambda: {"selector": ReLU()},
    "topk": lambda: {"selector": TopK(5)},
    "abstopk": lambda: {"selector": TopK(5, score="abs")},
    "groupmax": lambda: {"selector": GroupMax(6)},
    "jumprelu": lambda: {"selector": JumpReLU(0.4, 0.1)},
    "batch_topk": lambda: {"selector": BatchTopK(5)},
    "batch_topk_norm": lambda: {"selector": BatchTopK(5, score="norm")},
    "feature_choice": lambda: {"selector": FeatureChoice(5)},
    "gated": lambda: {"encoder": GatedEncoder(), "selector": ReLU()},
    "pursuit": lambda: {"encoder": PursuitEncoder("mp", 5, "relu", 0.3, stop_on_repeat=True)},
    "pursuit_max": lambda: {"encoder": PursuitEncoder("mp", 5, "max")},
}


def rows(n: int = 40, seed: int = 1) -> torch.Tensor:
    """``(n, D)`` rows that are not centred."""
    return 1.5 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def some_sae(
    kind: str,
    subtract: bool = True,
    bias: bool = True,
    normaliser: Normaliser | None = None,
    modalities: tuple[str, ...] = ("image",),
    d_sae: int = F,
) -> SAE:
    """An SAE of a kind in eval mode: random weights, atoms of several norms unless it is a pursuit."""
    torch.manual_seed(0)
    parts = KINDS[kind]()
    parts.setdefault("encoder", AffineEncoder(subtract_decoder_bias=subtract))
    dictionary = Dictionary("unit" if kind.startswith("pursuit") else "free", bias=bias)
    sae = SAE(D, d_sae, modalities=modalities, normaliser=normaliser, dictionaries={"shared": dictionary}, **parts)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name.startswith("encoder") or name.endswith("bias"):
                p.normal_(std=0.4)
        if not kind.startswith("pursuit"):
            dictionary.weight.normal_(std=0.5)
        if normaliser is not None:
            sae.fresh = False
            sae.fit_normaliser({m: rows(100, 9) for m in modalities})
        if sae.selector.couples_batch:
            sae.train()
            sae({m: rows(100, 8) for m in modalities})
    return sae.eval().requires_grad_(False)


def assert_equal_codes(sae: SAE, codes: torch.Tensor, x_hat: torch.Tensor, modality: str | None = None) -> None:
    """What a library computes of :func:`rows` is what the SAE does: supports exactly, values to 1e-5."""
    own = sae.encode(rows(), modality)
    dense = own.to_dense()
    assert (dense != 0).any() and torch.equal(dense != 0, codes != 0)
    torch.testing.assert_close(codes.detach(), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_hat.detach(), sae.decode(own), atol=2e-5, rtol=1e-5)

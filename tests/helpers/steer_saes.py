"""SAEs of every composition, and rows for them."""

import copy

import torch

from mmsae import SAE
from mmsae.hosts.sites import Where
from mmsae.sae import AffineEncoder, Dictionary, DistanceEncoder, Normaliser, PerModalityEncoder, TopK

K, D, F = 4, 16, 48
ROWS = Normaliser(unit_in=True, centre=True, unit_out=True)


def own(norm="unit"):
    return {m: Dictionary(norm=norm) for m in ("image", "text")}


COMPOSITIONS = {
    "topk": lambda: {"modalities": ["image"]},
    "shared_rms": lambda: {"normaliser": Normaliser(centre=True, scale="rms")},
    "paired_topk": lambda: {"normaliser": copy.deepcopy(ROWS), "dictionaries": own()},
    "vl_sae": lambda: {"encoder": DistanceEncoder(), "selector": TopK(K, strict=True), "dictionaries": own("free")},
    "dual": lambda: {"encoder": PerModalityEncoder(AffineEncoder()), "dictionaries": own()},
}
AFFINE = [n for n in COMPOSITIONS if n != "vl_sae"]


def make(name="topk", seed=0, d=D):
    """``(sae, x (64, d))``, weights off their symmetric start; the last latent of affine encoders never fires."""
    torch.manual_seed(seed)
    sae = SAE(**({"d_in": d, "d_sae": F, "selector": TopK(K)} | COMPOSITIONS[name]()))
    x = torch.randn(64, d) + 0.5
    sae.fit_normaliser({m: x for m in sae.modalities})
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for part in sae.encoder.modules():
            if isinstance(part, AffineEncoder):
                part.bias[-1] = -100.0
    return sae.eval().requires_grad_(False), x


def orthonormal(d=8, k=None):
    """A linear SAE with the identity as both encoder and dictionary."""
    sae = SAE(d, d, modalities=["image"], selector=TopK(k or d)).eval().requires_grad_(False)
    sae.encoder.weight.copy_(torch.eye(d))
    sae.dictionary("image").weight.copy_(torch.eye(d))
    return sae


def items(n, **more):
    return Where(torch.arange(n), **more)


def fired(sae, x, m="image"):
    """``(id that fires in row 0, id that does not fire in any row)``."""
    codes = sae.encode(x, m)
    on = int(codes.indices[0, codes.values[0].argmax()])
    return on, int((codes.to_dense() == 0).all(0).nonzero()[0]) if (codes.to_dense() == 0).all(0).any() else None


def mean_kl(clean, steered):
    """Mean over positions of ``KL(clean || steered)`` of logits, in nats."""
    p, q = clean.float().log_softmax(-1), steered.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())

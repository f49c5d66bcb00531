"""Codes with signs: who has them, and that both poles of a latent count as firing."""

import pytest
import torch

from mmsae import SAE
from mmsae.metrics.sparsity import sparsity
from mmsae.sae import BatchTopK, PursuitEncoder, ReLU, TopK, UsageTracker


@pytest.mark.parametrize(
    ("parts", "signed"),
    [
        ({"selector": TopK(4)}, False),
        ({"selector": TopK(4, score="abs")}, True),
        ({"selector": BatchTopK(4, score="abs")}, True),
        ({"selector": ReLU()}, False),
        ({"encoder": PursuitEncoder(steps=4)}, False),
        ({"encoder": PursuitEncoder(steps=4, sign="abs")}, True),
    ],
)
def test_an_sae_says_whether_its_codes_have_signs(parts, signed):
    torch.manual_seed(0)
    sae = SAE(10, 30, modalities=("image",), **parts)
    codes = sae({"image": torch.randn(40, 10)})["image"].codes
    assert sae.signed is signed and bool((codes.values < 0).any()) is signed


def test_what_fires_with_plus_and_minus_one_is_alive():
    sae = SAE(2, 2, modalities=("image",), selector=TopK(1, score="abs"))
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(2))
    codes = sae.encode(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    usage = UsageTracker(2, ("image",))
    usage.update({"image": codes})
    stats = sparsity(codes)
    assert usage.dead(2).tolist() == [False, True] and usage.density("image").tolist() == [1.0, 0.0]
    assert stats.l0 == 1 and stats.dead_fraction == 0.5 and codes.l0().tolist() == [1, 1]

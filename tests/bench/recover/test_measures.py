"""An SAE that is the truth gets full marks, and each figure falls by what is taken away."""

import pytest
import torch

from mmsae.bench.recover.measures import match, recovery
from mmsae.bench.recover.worlds import WORLDS
from mmsae.sae import SAE, AffineEncoder, ReLU


def truth(world, order):
    """An SAE whose code is the true one where atoms are orthonormal."""
    sae = SAE(world.width, world.size, modalities=["image"], encoder=AffineEncoder(), selector=ReLU())
    with torch.no_grad():
        for weight in (sae.dictionary("image").weight, sae.encoder.weight):
            weight.copy_(world.atoms["image"][order])
        sae.encoder.bias.fill_(-0.1)  # above the noise
    return sae.eval()


@pytest.fixture
def world():
    return WORLDS["hierarchical"](0)


def test_the_truth_is_found_whatever_its_order(world):
    x, codes = world.sample(2000, 5)
    order = torch.randperm(world.size, generator=torch.Generator().manual_seed(1))
    found = recovery(truth(world, order), world, x, codes)
    assert found["cosine"] == pytest.approx(1) and found["found"] == 1
    assert found["precision"] == 1 and found["recall"] > 0.999 and found["dead"] == 0
    assert found["absorption"] < 0.01 and found["l0"] == pytest.approx(1.36, abs=0.1) and found["fvu"] < 0.02


def test_a_lost_latent_is_missed(world):
    x, codes = world.sample(2000, 5)
    sae = truth(world, torch.arange(world.size))
    with torch.no_grad():
        sae.encoder.bias[0] = -100.0  # the first parent never fires
    found = recovery(sae, world, x, codes)
    missed = float((codes[:, 0] != 0).sum() / (codes != 0).sum())
    assert found["dead"] == pytest.approx(1 / 20) and found["recall"] == pytest.approx(1 - missed, abs=0.002)
    assert found["absorption"] == pytest.approx(1 / 3, abs=0.01)  # its three children of nine


def test_matching_is_one_to_one_and_signs_count_where_they_must():
    atoms = torch.eye(4)
    rows, columns, cosine = match(torch.stack([-atoms[2], atoms[0], atoms[0]]), atoms, signed=True)
    assert sorted(rows.tolist()) == [0, 1, 2] and len(set(columns.tolist())) == 3 and cosine.sum() == 2
    assert match(torch.stack([-atoms[2], atoms[0]]), atoms)[2].sum() == 1

"""Synthetic activations: the dictionary and the codes are what they are said to be."""

import pytest
import torch

from mmsae.activations import SyntheticLoader, SyntheticPairs
from mmsae.types import InputError


def draw(pairs, n=2000, seed=0):
    return pairs.sample(n, torch.Generator().manual_seed(seed))


def test_x_is_the_sum_of_its_atoms():
    pairs = SyntheticPairs(16, 40, 3, noise=0.0, modality_gap=2.0)
    tokens, codes = draw(pairs)
    for m in ("image", "text"):
        assert torch.equal(codes[m].l0(), torch.full((2000,), 3))
        x = codes[m].to_dense() @ pairs.atoms[m] + pairs.mean[m]
        torch.testing.assert_close(tokens.x[m], x)
        torch.testing.assert_close(pairs.atoms[m].norm(dim=1), torch.ones(40))
        torch.testing.assert_close(pairs.mean[m].norm(), torch.tensor(2.0))
    assert tokens.paired()
    fired = (codes["image"].to_dense() > 0).float().mean(0)
    assert (fired - 3 / 40).abs().max() < 6 * (3 / 40 / 2000) ** 0.5


@pytest.mark.parametrize("cosine", [0.0, 0.5, 1.0])
def test_modalities_share_atoms_to_the_stated_degree(cosine):
    pairs = SyntheticPairs(256, 500, 3, atom_cosine=cosine)
    between = (pairs.atoms["image"] * pairs.atoms["text"]).sum(1)
    assert abs(float(between.mean()) - cosine) < 0.02


def test_noise_has_the_stated_norm():
    clean, noisy = (draw(SyntheticPairs(64, 40, 3, noise=s))[0].x["image"] for s in (0.0, 0.3))
    torch.testing.assert_close((noisy - clean).norm(dim=1).mean(), torch.tensor(0.3), rtol=0.02, atol=0)


def test_batches_derive_from_seed_epoch_step_and_rank():
    pairs = SyntheticPairs(8, 10, 2)

    def first(epoch=0, batch=0, **kw):
        return SyntheticLoader(pairs, 4, 3, **kw).make(epoch, batch)[0].x["image"]

    assert torch.equal(first(), first())
    for other in ({"epoch": 1}, {"batch": 1}, {"seed": 1}, {"rank": 1}):
        assert not torch.equal(first(), first(**other))
    assert torch.equal(first(fresh=False), first(epoch=5, fresh=False))


@pytest.mark.parametrize("done", range(7))
def test_a_resumed_loader_goes_on(done):
    pairs = SyntheticPairs(8, 10, 2)

    def run(loader, n):
        got = []
        while len(got) < n:
            for b in loader:
                got.append(b.x["image"])
                if len(got) == n:
                    return got, loader.state_dict()
        return got, loader.state_dict()

    whole, _ = run(SyntheticLoader(pairs, 4, 3), 9)
    _, state = run(SyntheticLoader(pairs, 4, 3), done)
    again = SyntheticLoader(pairs, 4, 3)
    again.load_state_dict(state)
    rest, _ = run(again, 9 - done)
    assert all(torch.equal(a, b) for a, b in zip(whole[done:], rest, strict=True))


def test_wrong_arguments():
    with pytest.raises(InputError, match="k is 11"):
        SyntheticPairs(8, 10, 11)
    with pytest.raises(InputError, match="atom_cosine is 2"):
        SyntheticPairs(8, 10, 2, atom_cosine=2)

"""Energy, modality, bridges against the dense formula, stability."""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae.metrics.pairs.bridge import bridge, energy, modality_share, stability
from mmsae.types import Codes, InputError


def codes(n, d, k, seed):
    g = torch.Generator().manual_seed(seed)
    return Codes(torch.rand(n, k, generator=g), torch.rand(n, d, generator=g).argsort(1)[:, :k], d)


def test_modality_of_image_text_and_shared_features():
    z = torch.eye(3)
    image = Codes(z[[0, 0, 2, 2]], None, 3)
    text = Codes(z[[1, 1, 2, 2, 1, 1, 2, 2]], None, 3)  # twice as many texts: means are compared
    mu = modality_share(energy(image), energy(text))
    assert mu.tolist() == [1.0, 0.0, 0.5]
    torch.testing.assert_close(modality_share(energy(text), energy(image)), 1 - mu)
    assert modality_share(torch.zeros(1), torch.zeros(1)).isnan().all()


@pytest.mark.parametrize("chunk", [7, 1000])
def test_bridge_equals_the_dense_formula(chunk):
    a, b = codes(50, 12, 3, 0), codes(50, 12, 4, 1)
    atoms = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    d = normalize(atoms.double(), dim=1)
    dense = (a.to_dense().double().T @ b.to_dense().double() / 50) * (d @ d.T)
    got = bridge(a, b, atoms, top=20, chunk=chunk)
    torch.testing.assert_close(got.value, dense[got.image, got.text])
    torch.testing.assert_close(got.value.abs(), dense.abs().flatten().sort(descending=True).values[:20])
    assert got.mass == pytest.approx(dense.abs().sum().item())
    off = dense.abs().sum() - dense.diagonal().abs().sum()
    assert got.off_diagonal == pytest.approx((off / dense.abs().sum()).item())
    dense_codes = Codes(a.to_dense(), None, 12), Codes(b.to_dense(), None, 12)
    assert bridge(*dense_codes, atoms).mass == pytest.approx(got.mass)


def test_orthogonal_atoms_have_no_bridges_between_features():
    got = bridge(codes(40, 6, 3, 3), codes(40, 6, 3, 4), torch.eye(6))
    assert got.off_diagonal == 0 and got.mass > 0


def test_cross_modal_mass_is_that_between_an_image_and_a_text_feature():
    image, text = Codes(torch.tensor([[1.0, 0, 1]]), None, 3), Codes(torch.tensor([[0.0, 1, 1]]), None, 3)
    atoms = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    got = bridge(image, text, atoms)  # bridges 0-1 (image, text), 0-2, 2-1, 2-2: all 1
    assert got.mass == 4 and got.off_diagonal == 0.75 and got.cross_modal == 0.25
    with pytest.raises(InputError, match="not paired"):
        bridge(image, codes(2, 3, 1, 0), atoms)


def test_stability_is_one_for_permuted_atoms_and_low_for_others():
    g = torch.Generator().manual_seed(5)
    atoms, other = torch.randn(40, 8, generator=g), torch.randn(40, 8, generator=g)
    order = torch.randperm(40, generator=g)
    weight = torch.rand(40, generator=g)
    got = stability(atoms, 3 * atoms[order], weight)
    assert all(v == pytest.approx(1) for v in got.values()) and set(got) == {"stability", "nearest", "energy_weighted"}
    chance = stability(atoms, other)
    null = torch.stack([(normalize(atoms, dim=1) @ normalize(torch.randn(40, 8, generator=g), dim=1).T).amax(1).mean()
                        for _ in range(20)])  # fmt: skip
    assert abs(chance["nearest"] - null.mean()) < 5 * null.std()
    assert chance["stability"] <= chance["nearest"]
    assert stability(atoms[:10], atoms)["stability"] == pytest.approx(1)
    with pytest.raises(InputError, match="8 and 4"):
        stability(atoms, other[:, :4])

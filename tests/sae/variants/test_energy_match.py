"""Energy match against the oracles of multimodal_saes, section 2."""

import pytest
import torch

from mmsae import InputError
from mmsae.sae import CodeCosine, EnergyMatch
from tests.helpers.pairs import context, outputs_of, random_codes

both = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


def value(z, w, by="energy", sparse=True, coefficient=1.0, **kw):
    return float(EnergyMatch(coefficient, by)(outputs_of(z, w, sparse=sparse), context(len(z[0]), **kw)))


@both
def test_equal_codes_match_and_disjoint_supports_do_not(sparse):
    z, w = [[1.0, 0.5, 0.0, 0.0]], [[0.0, 0.0, 2.0, 0.1]]
    for by in ("energy", "pairs"):
        assert value(z, z, by, sparse) == 0.0
        assert value(z, w, by, sparse) == pytest.approx(1.0, abs=1e-3)
    cosine = CodeCosine(1.0)
    assert float(cosine(outputs_of(z, z, sparse=sparse), context(4))) == pytest.approx(0.0, abs=1e-6)
    assert float(cosine(outputs_of(z, w, sparse=sparse), context(4))) == pytest.approx(1.0)


@both
def test_energies_2_and_1_are_a_third_apart(sparse):
    assert value([[2.0**0.5]], [[1.0]], sparse=sparse) == pytest.approx(1 / 3, abs=1e-5)


@both
def test_energies_need_no_pairs_and_no_equal_counts(sparse):
    z, w = random_codes(seed=0), random_codes(seed=1)
    plain = value(z, w, sparse=sparse)
    assert value(z.roll(5, 0), torch.cat([w, w]), sparse=sparse) == pytest.approx(plain, rel=1e-5)
    e = [c.square().mean(0) for c in (z, w)]
    assert plain == pytest.approx(float(((e[0] - e[1]).abs() / (e[0] + e[1] + 1e-5)).mean()), rel=1e-5)


@both
def test_pairs_see_which_rows_belong_together_and_ranks_do_not(sparse):
    z, w = random_codes(seed=0), random_codes(seed=1)
    e = z.square().mean(0) + w.square().mean(0)
    assert value(z, w, "pairs", sparse) == pytest.approx(
        float(((z - w).square().mean(0) / (e + 1e-5)).mean()), rel=1e-5
    )
    assert value(z, z.roll(1, 0), "pairs", sparse) > 0.5
    assert value(z, z.roll(1, 0), "energy", sparse) == pytest.approx(0.0, abs=1e-6)
    assert value(z, z.roll(1, 0), "ranks", sparse) == pytest.approx(torch.tensor(1e-5).log().item(), rel=1e-4)
    apart = (z.sort(0).values - w.sort(0).values).abs().mean()
    assert value(z, w, "ranks", sparse) == pytest.approx(float((apart + 1e-5).log()), rel=1e-5)


def test_dead_latents_count_as_matched_and_give_finite_gradients():
    z = torch.zeros(3, 4, requires_grad=True)
    w = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).repeat(3, 1)
    for by in ("energy", "ranks", "pairs"):
        term = EnergyMatch(by=by)
        loss = term(outputs_of(z, w), context(4))
        (grad,) = torch.autograd.grad(loss, z)
        assert torch.isfinite(grad).all()
    assert value(z.detach(), w) == pytest.approx(0.25, abs=1e-4)


def test_the_gradient_brings_energies_together():
    z = random_codes(seed=0).requires_grad_()
    w = random_codes(seed=0) * 2
    before = value(z.detach(), w)
    (grad,) = torch.autograd.grad(EnergyMatch(1.0)(outputs_of(z, w), context(12)), z)
    assert value((z - 5.0 * grad).detach(), w) < before


def test_it_ramps_and_refuses_what_it_cannot_compare():
    z, w = random_codes(seed=0), random_codes(seed=1)
    assert value(z, w, progress=0.05, coefficient=0.4) == pytest.approx(0.2 * value(z, w), rel=1e-5)
    for by in ("ranks", "pairs"):
        with pytest.raises(InputError, match=rf"energy_match by {by} needs pairs.*'image': 40, 'text': 39"):
            value(z, w[1:], by)
    with pytest.raises(InputError, match=r"compares two modalities, not \{'image': 40\}"):
        EnergyMatch()(outputs_of(z), context(12))
    with pytest.raises(InputError, match="one of energy, ranks, pairs, not 'x'"):
        EnergyMatch(by="x")

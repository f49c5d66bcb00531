"""Frozen atoms and the non-negative lasso: multimodal_saes, section 8."""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae import SAE, InputError
from mmsae.sae import AffineEncoder, FrozenDictionary, LassoEncoder, PursuitEncoder, random_control, select_latents


def given(encoder=None, n=40, d=12, names=None):
    torch.manual_seed(0)
    own = FrozenDictionary(16)
    sae = SAE(d, n, modalities=["image"], encoder=encoder or LassoEncoder(), dictionaries={"shared": own})
    own.fill_(torch.randn(n, d) * 3, names or [f"word {i} é" for i in range(n)])
    sae.fit_normaliser({"image": torch.randn(100, d)})
    return sae.eval()


def unit_rows(n=30, d=12):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(5)), dim=1)


def test_one_atom_is_shrunk_by_half_the_penalty():
    sae = SAE(3, 1, modalities=["image"], encoder=LassoEncoder(0.3), dictionaries={"shared": FrozenDictionary()})
    sae.dictionary("image").fill_(torch.tensor([[0.0, 2.0, 0.0]]), ["a"])
    z = sae.encode(torch.tensor([[0.0, 0.8, 5.0], [0.0, 0.1, 1.0], [0.0, -3.0, 0.0]]), "image").to_dense()
    torch.testing.assert_close(z, torch.tensor([[0.65], [0.0], [0.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("penalty", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("n, d", [(40, 12), (6, 12)], ids=["overcomplete", "few"])
def test_codes_meet_the_conditions_of_the_optimum_and_are_sklearns(n, d, penalty):
    from sklearn.linear_model import Lasso

    sae, x = given(LassoEncoder(penalty), n, d), unit_rows(d=d)
    atoms, z = sae.dictionary("image").rows(), sae.encode(x, "image").to_dense()
    gradient = 2.0 * (x - z @ atoms) @ atoms.T  # of the error, at z
    assert (gradient <= penalty + 1e-4).all() and (z >= 0).all()
    assert ((gradient - penalty).abs()[z > 1e-4] < 1e-4).all() and (z > 0).any()
    solver = Lasso(alpha=penalty / (2 * d), positive=True, fit_intercept=False, tol=1e-8, max_iter=100_000)
    for row, code in zip(x[:5], z[:5], strict=True):
        want = torch.from_numpy(solver.fit(atoms.T.double().numpy(), row.double().numpy()).coef_).float()
        ours, theirs = ((row - c @ atoms).square().sum() + penalty * c.sum() for c in (code, want))
        assert abs(ours - theirs) < 1e-5
        if penalty > 0.1:  # below that, with more atoms than features, the optimum is flat
            torch.testing.assert_close(code, want, atol=2e-4, rtol=0)


def test_a_larger_penalty_has_fewer_words_and_none_at_last():
    x = unit_rows()
    l0 = [float(given(LassoEncoder(p)).encode(x, "image").l0().float().mean()) for p in (0.05, 0.3, 0.8, 2.0)]
    assert l0 == sorted(l0, reverse=True) and l0[0] > 2 * l0[2] > 0 and l0[3] == 0


def test_a_row_is_solved_without_the_others_and_stops_by_itself():
    sae, x = given(), unit_rows()
    together = sae._encode({"image": x})["image"]
    steps, z = together[1].steps, together[2].to_dense()
    assert steps.min() < steps.max() < 2000
    for i in (0, 13, 29):
        codes = sae.encode(x[i : i + 1], "image")
        torch.testing.assert_close(codes.to_dense()[0], z[i], atol=2e-6, rtol=0)
    torch.testing.assert_close(together[1].x, x - z @ sae.dictionary("image").rows())
    assert sae.encode(x[:0], "image").n == 0


def test_names_and_atoms_are_saved_and_stay_together(tmp_path):
    sae, x = given(), unit_rows()
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    assert torch.equal(again.encode(x, "image").to_dense(), sae.encode(x, "image").to_dense())
    assert again.dictionary("image").names == [f"word {i} é" for i in range(40)]
    few = select_latents(sae, [7, 3])
    assert few.dictionary("image").names == ["word 7 é", "word 3 é"]
    assert torch.equal(few.dictionary("image").rows(), sae.dictionary("image").rows()[[7, 3]])
    control = random_control(sae).dictionary("image").rows()
    torch.testing.assert_close(control.norm(dim=1), torch.ones(40))
    assert not torch.allclose(control, sae.dictionary("image").rows())


def test_another_solver_reads_the_same_atoms_and_nothing_is_trained():
    sae, x = given(PursuitEncoder("omp", 5)), unit_rows()
    assert (sae.encode(x, "image").l0() <= 5).all() and not list(sae.parameters())
    before = sae.dictionary("image").rows().clone()
    sae.after_step_()
    assert torch.equal(sae.dictionary("image").rows(), before)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SAE(8, 9, encoder=AffineEncoder(), dictionaries={"shared": FrozenDictionary()}), "not 'affine'"),
        (lambda: given(names=["a"] * 39), r"\(40, 12\) atoms with 39 names do not fit .* \(40, 12\)"),
        (lambda: given(names=["a" * 17] * 40), "'aaaaaaaaaaaaaaaaa' has 17 bytes, more than width 16"),
        (lambda: given().dictionary("image").fill_(torch.zeros(40, 12), ["a"] * 40), "atom of 'a' has no direction"),
        (lambda: LassoEncoder(-1.0), "penalty >= 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()

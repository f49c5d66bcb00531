"""The error of an SAE, split into what x predicts of it and the rest: identities, and cases with a known answer."""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae import SAE, InputError, Tokens
from mmsae.metrics import ErrorDecomposition, error_from_sites, fvu, predictable_share
from mmsae.metrics.components import Components
from mmsae.metrics.regression import Regression
from mmsae.sae import TopK, calibrate_scale, with_pursuit
from mmsae.types import Codes
from tests.helpers.recipes import atoms_rows

D = 16
FIT, EVAL = (atoms_rows(n, D, n_atoms=40, seed=i) + 0.3 for i, n in enumerate((1500, 900)))


def sae_of(seed=0):
    torch.manual_seed(seed)
    sae = SAE(D, 48, modalities=["image"], selector=TopK(4))
    sae.fit_normaliser({"image": FIT})
    return sae.eval()


class Made:
    """An "SAE" whose reconstruction is a function of x."""

    def __init__(self, function):
        self.function = function

    def encode(self, x, modality=None):
        return Codes(x, None, x.shape[1])

    def decode(self, codes, modality=None):
        return self.function(codes.values)


def noise(like, sigma, seed):
    return sigma * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).double()


def test_the_parts_sum_to_x_and_on_the_fit_nothing_linear_is_left():
    own = ErrorDecomposition(sae_of()).fit(FIT)
    p = own.parts(FIT)
    x = FIT.double()
    torch.testing.assert_close(sum(p), x, rtol=0, atol=3e-7)
    with_one = torch.cat([x, torch.ones(len(x), 1)], 1)
    assert (p.nonlinear.T @ with_one / len(x)).abs().max() < 1e-7
    assert (p.linear.T @ with_one / len(x)).abs().max() > 1e-3


def test_the_figures_are_those_of_the_rows_and_the_fvu_identity_is_exact():
    sae = sae_of()
    own = ErrorDecomposition(sae, "image").fit(FIT)
    r, p, x = own.evaluate(EVAL), own.parts(EVAL), EVAL.double()
    about = lambda t: (t - t.mean(0)).square()  # noqa: E731
    e, variance = x - p.x_hat, about(x).sum()
    assert r.fvu == pytest.approx(fvu(p.x_hat.float(), EVAL), rel=1e-6)
    assert r.fvu_nonlinear == pytest.approx(fvu(p.x_hat + p.linear, EVAL), rel=1e-9)
    assert r.fvu_nonlinear == pytest.approx((1 - r.r2) * float(about(e).sum() / variance), rel=1e-12)
    assert r.fvu_linear == r.fvu - r.fvu_nonlinear > 0
    own_r2 = 1 - p.nonlinear.square().sum(0) / about(e).sum(0)
    assert r.r2_dimensions == pytest.approx(float(own_r2.mean()), rel=1e-9)
    assert abs(r.r2_dimensions - r.r2) > 1e-4
    fit = own.parts(FIT)
    e_fit = fit.linear + fit.nonlinear
    assert r.r2_fit == pytest.approx(1 - float(fit.nonlinear.square().sum() / about(e_fit).sum()), rel=1e-9)
    assert 0 < r.r2 < r.r2_fit + 0.1 and (r.n_fit, r.n) == (1500, 900)
    # of |e|^2, by an independent solver
    one = lambda t: torch.cat([t.double(), torch.ones(len(t), 1)], 1)  # noqa: E731
    y_fit, y = e_fit.square().sum(1), e.square().sum(1)
    codes_fit, codes = sae.encode(FIT).l0()[:, None], sae.encode(EVAL).l0()[:, None]
    pairs = {"norm_r2": (FIT, EVAL), "norm_by_l0": (codes_fit, codes)}
    pairs["norm_by_norm"] = tuple(t.double().square().sum(1, keepdim=True) for t in (FIT, EVAL))
    for name, (a, b) in pairs.items():
        w = torch.linalg.lstsq(one(a), y_fit[:, None], driver="gelsd").solution[:, 0]
        want = 1 - float((y - one(b) @ w).square().sum() / about(y).sum())
        assert getattr(r, name) == pytest.approx(want, rel=1e-6, abs=1e-9), name


def test_batches_do_not_matter_and_special_tokens_are_left_out():
    own = ErrorDecomposition(sae_of())
    whole = own.fit(FIT).evaluate(EVAL)
    stream = own.fit(FIT.split(123)).evaluate(iter(EVAL.split(77)))
    assert whole == pytest.approx(stream, rel=1e-9)
    huge = torch.full((10, D), 1e3)
    tokens = [
        Tokens(
            {"image": torch.cat([huge, x])}, {"image": torch.arange(len(x) + 10)},
            special={"image": torch.arange(len(x) + 10) < 10},
        )
        for x in EVAL.split(300)
    ]  # fmt: skip
    assert own.evaluate(tokens) == pytest.approx(whole, rel=1e-9)
    assert ErrorDecomposition(sae_of(), "image").fit(FIT).evaluate(tokens) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("s", [0.9, 0.5, 0.1])
def test_shrinkage_is_all_linear_and_nothing_of_it_is_left_after_rescaling(s):
    r = ErrorDecomposition(Made(lambda x: s * x)).fit(FIT).evaluate(EVAL)
    assert r.r2 == pytest.approx(1, abs=1e-9) and r.identity == pytest.approx(1, abs=1e-9)
    assert r.scale == pytest.approx(1 / s) and r.fvu_rescaled < 1e-9 and r.r2_rescaled != r.r2_rescaled


def test_a_linear_autoencoder_has_r2_of_1_which_is_not_shrinkage():
    r = ErrorDecomposition(Components.leading(FIT, 5)).fit(FIT).evaluate(EVAL)
    assert r.r2 == pytest.approx(1, abs=1e-6) and r.r2_rescaled == pytest.approx(1, abs=1e-6)
    assert r.scale == pytest.approx(1, abs=1e-6) and r.identity < 0.9


def test_white_noise_lowers_r2_by_the_computed_amount():
    """The variance of the noise joins that of the error and of the nonlinear part."""
    base, sigma = Components.leading(FIT, 5), 0.2
    sets = {len(x): noise(x, sigma, i) for i, x in enumerate((FIT, EVAL))}
    own = Made(lambda x: base.decode(base.encode(x)).double() + sets[len(x)])
    linear = ErrorDecomposition(base).fit(FIT).parts(EVAL).linear
    variance = float((linear - linear.mean(0)).square().sum() / len(EVAL))
    r = ErrorDecomposition(own).fit(FIT).evaluate(EVAL)
    assert r.r2 == pytest.approx(variance / (variance + D * sigma**2), abs=0.02)
    assert 0.05 < r.r2 < 0.95


def test_rescaling_is_what_calibrated_saes_have():
    """The figures at the best scale, against an SAE whose atoms have that scale."""
    sae = sae_of()
    with torch.no_grad():
        sae.dictionaries["shared"] = type(sae.dictionary("image"))("free")
        sae.dictionaries["shared"].build(D, 48)
        sae.dictionary("image").weight.copy_(0.6 * normalize(sae.encoder.weight))
        sae.dictionary("image").bias.copy_(FIT.mean(0))
    own = ErrorDecomposition(sae).fit(FIT)
    r, shift = own.evaluate(EVAL), own.parts(FIT).x_hat.mean(0)
    scaled = Made(lambda x: shift + r.scale * (own.parts(x).x_hat - shift))
    want = ErrorDecomposition(scaled).fit(FIT).evaluate(EVAL)
    assert r.r2_rescaled == pytest.approx(want.r2, abs=1e-6) and want.scale == pytest.approx(1, abs=1e-6)
    assert r.r2_rescaled < r.r2 - 0.02 and r.identity > 0.02
    assert r.fvu_nonlinear == pytest.approx(want.fvu_nonlinear / r.scale**2, rel=1e-6)
    again = ErrorDecomposition(calibrate_scale(sae, {"image": FIT})).fit(FIT).evaluate(EVAL)
    assert again.scale == pytest.approx(1, abs=0.1) and again.fvu < r.fvu


def test_too_few_rows_are_refused_with_both_numbers():
    with pytest.raises(InputError, match=r"width 16 needs at least 320 rows .* not 319"):
        ErrorDecomposition(sae_of()).fit(FIT[:319])
    ErrorDecomposition(sae_of()).fit(FIT[:320])
    # the trap: 60 rows in 48 dimensions fit noise
    torch.manual_seed(0)
    x, y = torch.randn(2, 60, 48).double(), torch.randn(2, 60, 48).double()
    w = torch.linalg.lstsq(x[0], y[0]).solution
    inside, outside = (1 - float((y[i] - x[i] @ w).square().sum() / y[i].square().sum()) for i in (0, 1))
    assert inside > 0.6 and outside < -1


def test_rows_of_the_fit_are_recognised():
    own = ErrorDecomposition(sae_of()).fit(FIT)
    for rows in (FIT, FIT[200:900].flip(0), torch.cat([FIT[:60], EVAL[:50]])):
        with pytest.raises(InputError, match=f"of the {len(rows):,} rows to measure on are among the 1,500"):
            own.evaluate(rows)
    own.evaluate(torch.cat([FIT[:40], EVAL[:50]]))  # some images are twice in a set
    with pytest.raises(InputError, match="no rows"):
        own.evaluate([])
    with pytest.raises(InputError, match="nothing was fitted"):
        ErrorDecomposition(sae_of()).evaluate(EVAL)


def test_directions_that_do_not_vary_are_left_out():
    x = torch.cat([FIT, FIT[:, :3], torch.ones(len(FIT), 1)], 1)
    y = FIT.double() @ torch.randn(D, 4).double()
    both = Regression()
    both.add(x, y)
    affine = both.fit()
    assert affine.weight.abs().max() < 100
    torch.testing.assert_close(affine(x), y, rtol=0, atol=1e-6)


def test_a_pursuit_at_the_same_l0_leaves_less_of_the_error_unexplained():
    """Section 6a: with the encoder out of the way, what is left is the dictionary's."""
    sae = sae_of()
    reports = [ErrorDecomposition(s).fit(FIT).evaluate(EVAL) for s in (sae, with_pursuit(sae, "gp"))]
    assert reports[1].fvu < reports[0].fvu and reports[1].fvu_nonlinear < reports[0].fvu_nonlinear


def test_the_share_for_benchmarks_is_the_pooled_r2():
    sae = sae_of()
    own = ErrorDecomposition(sae, "image").fit(FIT).evaluate(EVAL)
    assert predictable_share(sae, FIT, EVAL, "image") == own.r2


def test_other_sites_predict_what_they_share_with_the_error():
    """A site that holds the error predicts all of it, one that holds its linear part not the rest, noise nothing."""
    sae = sae_of()
    own = ErrorDecomposition(sae).fit(FIT)

    def batches(x, seed):
        for i, part in enumerate(x.split(250)):
            p = own.parts(part)
            random = noise(part, 1.0, seed + i)
            yield {"here": part, "whole": p.linear + p.nonlinear, "linear": p.linear, "noise": random}

    others = dict.fromkeys(("whole", "linear", "noise"), Made(lambda x: x))
    found = error_from_sites(own, "here", others, batches(FIT, 10), batches(EVAL, 50))
    r = own.evaluate(EVAL)
    assert found["whole"].error == pytest.approx(1, abs=1e-6) and found["all"].error == pytest.approx(1, abs=1e-6)
    assert found["linear"].error == pytest.approx(r.r2, abs=0.01)
    assert abs(found["linear"].nonlinear) < 0.05 and abs(found["noise"].error) < 0.05
    assert found["whole"].nonlinear > 0.9 * (1 - r.r2)
    with pytest.raises(InputError, match="width 48 needs at least 960 rows"):
        error_from_sites(own, "here", others, batches(FIT[:500], 0), batches(EVAL, 50))
    alone = error_from_sites(own, "here", {"noise": Made(lambda x: x)}, batches(FIT, 10), batches(EVAL, 50))
    assert set(alone) == {"noise"} and alone["noise"] == pytest.approx(found["noise"])

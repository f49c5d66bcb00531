"""SAEs after their training: equal codes, equal reconstructions, or what is said to change."""

import copy

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.metrics import fvu
from mmsae.sae import (  # fmt: skip
    AffineEncoder,
    ArchetypalDictionary,
    BatchTopK,
    Dictionary,
    DistanceEncoder,
    EnergyTopK,
    FeatureChoice,
    GatedEncoder,
    GroupBias,
    GrowingDictionary,
    JumpReLU,
    Normaliser,
    PerModalityEncoder,
    PursuitAtL0,
    PursuitEncoder,
    ReLU,
    ScaledDictionary,
    TopK,
    calibrate_scale,
    fold_decoder_norm,
    to_jumprelu,
    truncate,
    with_pursuit,
)
from tests.helpers.recipes import atoms_rows

D, F, BOTH = 16, 48, ("image", "text")
X = {m: atoms_rows(200, D, seed=i) + 0.1 * i for i, m in enumerate(BOTH)}


def free(bias=True):
    return Dictionary("free", bias)


def model(selector, encoder=None, dictionaries=None, normaliser=None, norms=(0.5, 2.0), seed=0):
    """An SAE with random weights, biases and norms of atoms, whose thresholds (if any) have seen some batches."""
    torch.manual_seed(seed)
    sae = SAE(D, F, None, BOTH, normaliser, encoder, selector, dictionaries)
    sae.fit_normaliser(X)
    with torch.no_grad():
        each = getattr(sae.encoder, "encoders", None)
        for key, d in sae.dictionaries.items():
            if type(d) is Dictionary and d.norm == "free":  # atoms near the encoder's rows
                encoder = sae.encoder if each is None else each[key if key in BOTH else "image"]
                d.weight.copy_(torch.nn.functional.normalize(encoder.weight + 0.05 * torch.randn(F, D)))
                d.weight.mul_(torch.empty(F, 1).uniform_(*norms))
        for name, p in sae.named_parameters():
            if p.dim() == 1 and "thresholds" not in name:
                p.add_(0.05 * torch.randn_like(p))
        if isinstance(sae.selector, JumpReLU):
            sae.selector.thresholds.add_(0.5 * torch.rand_like(sae.selector.thresholds))
    sae.train()
    for i in range(3):
        sae({m: x[i * 50 : i * 50 + 50] for m, x in X.items()})
    return sae.eval()


def per_modality():
    return {m: free() for m in BOTH}


def codes(sae):
    return {m: sae.encode(X[m], m).to_dense() for m in sae.modalities}


def recon(sae):
    return {m: sae.decode(sae.encode(X[m], m)) for m in sae.modalities}


def same(a, b, **tolerance):
    for m in a:
        if tolerance:
            torch.testing.assert_close(a[m], b[m], **tolerance)
        else:
            assert torch.equal(a[m], b[m]), m


def loaded(sae, tmp_path):
    """It is frozen, and loaded again it codes and reconstructs alike."""
    assert not sae.training and not any(p.requires_grad for p in sae.parameters())
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    same(codes(again), codes(sae))
    same(recon(again), recon(sae))
    return again


# to_jumprelu


@pytest.mark.parametrize("score", ["value", "norm"])
@pytest.mark.parametrize("kind", [BatchTopK, FeatureChoice])
def test_exported_to_jumprelu_it_is_a_model_of_its_own(kind, score, tmp_path):
    sae = model(kind(4, score=score), dictionaries=per_modality())
    before = copy.deepcopy(sae.state_dict())
    new = to_jumprelu(sae)
    same(sae.state_dict(), before)
    assert loaded(new, tmp_path).selector.name == "jumprelu"
    assert new.selector.per_modality and not new.selector.log


def test_modalities_share_thresholds_where_they_are_equal():
    sae = model(BatchTopK(4))
    assert to_jumprelu(sae).selector.per_modality
    sae.selector.sum_[1], sae.selector.weight_[1] = sae.selector.sum_[0], sae.selector.weight_[0]
    new = to_jumprelu(sae)
    assert not new.selector.per_modality and new.selector.thresholds.shape == (1, F)
    same(codes(new), codes(sae))


def test_rows_at_the_very_threshold_are_decided_alike():
    """Scores of norm are products, whose rounding a quotient does not undo."""
    sae = model(BatchTopK(4, score="norm"), AffineEncoder(bias=False), {"shared": free(bias=False)})
    norms = sae.dictionary("image").rows().norm(dim=1)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(F, D))
    naive = 0
    for j in range(D):
        for step in range(-3, 4):
            u = (sae.selector.threshold("image") / norms[j]).view(torch.int32) + step
            x = torch.zeros(1, D)
            x[0, j] = u.view(torch.float32)
            code = sae.encode(x, "image").to_dense()
            assert torch.equal(to_jumprelu(sae).encode(x, "image").to_dense(), code)
            naive += int((x[0, j] > sae.selector.threshold("image") / norms[j]) != (code[0, j] != 0))
    assert naive > 0  # the plain quotient is wrong for some


def test_relu_is_jumprelu_at_0_and_others_have_no_threshold():
    sae = model(ReLU(), GatedEncoder())
    same(codes(to_jumprelu(sae)), codes(sae))
    sae = model(JumpReLU(0.1))
    same(codes(to_jumprelu(sae)), codes(sae))
    for selector in (TopK(4), BatchTopK(4, score="abs")):
        with pytest.raises(InputError, match=selector.name):
            to_jumprelu(model(selector))
    with pytest.raises(InputError, match="no threshold yet"):
        to_jumprelu(SAE(D, F, selector=BatchTopK(4)))


def test_top_k_learns_its_threshold_from_rows_by_hand():
    """Rows of pre-codes (4, 3, 2), (9, 1, 0) and (-1, -1, -1): with k 2 the smallest kept are 3, 1 and none, mean 2."""
    sae = SAE(3, 3, None, BOTH, None, AffineEncoder(bias=False), TopK(2), {"shared": Dictionary(bias=False)}).eval()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(3))
    rows = torch.tensor([[4.0, 3.0, 2.0], [9.0, 1.0, 0.0], [-1.0, -1.0, -1.0]])
    new = to_jumprelu(sae, {"image": rows, "text": 2 * rows})
    assert new.selector.threshold("image").tolist() == [2, 2, 2] and new.selector.threshold("text").tolist() == [4] * 3
    x = torch.tensor([[4.0, 3.0, 2.5], [9.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert new.encode(x, "image").to_dense().tolist() == [[4, 3, 2.5], [9, 0, 0], [0, 0, 0]]
    assert sae.selector.name == "topk" and sae.encode(x, "image").l0().tolist() == [2, 2, 2]


@pytest.mark.parametrize("encoder", [AffineEncoder, GatedEncoder])
def test_top_k_by_a_threshold_has_about_as_many_latents_and_is_a_model_of_its_own(encoder, tmp_path):
    sae = model(TopK(6), encoder())
    new = to_jumprelu(sae, X)
    for m, x in X.items():
        u = sae._encode({m: x})[m][1].dense()
        theta = u.topk(6).values[:, -1].mean()
        torch.testing.assert_close(new.selector.threshold(m), theta.expand(F))
        assert torch.equal(new.encode(x, m).to_dense() != 0, u > new.selector.threshold(m))
        assert 3 < new.encode(x, m).l0().float().mean() < 12
    loaded(new, tmp_path)


def test_top_k_without_rows_of_a_modality_or_by_absolute_values_is_refused():
    with pytest.raises(InputError, match="no text rows"):
        to_jumprelu(model(TopK(4)), {"image": X["image"]})
    with pytest.raises(InputError, match="topk"):
        to_jumprelu(model(TopK(4, score="abs")), X)
    silent = {m: torch.full((3, D), -1.0) for m in BOTH}
    sae = SAE(D, D, None, BOTH, None, AffineEncoder(bias=False), TopK(2), {"shared": Dictionary(bias=False)}).eval()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(D))
    with pytest.raises(InputError, match="keeps nothing of the 3 image rows"):
        to_jumprelu(sae, silent)


# fold_decoder_norm

FOLDED = {
    "relu": lambda: model(ReLU(), dictionaries={"shared": free()}),
    "relu without biases": lambda: model(ReLU(), AffineEncoder(bias=False), {"shared": free(bias=False)}),
    "jumprelu": lambda: model(JumpReLU(0.2), dictionaries={"shared": free()}),
    "jumprelu, dictionaries": lambda: model(JumpReLU(0.2, log=False), dictionaries=per_modality()),
    "gated": lambda: model(ReLU(), GatedEncoder(), {"shared": free()}),
    "gated, everything twice": lambda: model(ReLU(), PerModalityEncoder(GatedEncoder()), per_modality()),
    "topk by norm": lambda: model(TopK(4, score="norm"), dictionaries=per_modality()),
    "batch_topk by norm": lambda: model(BatchTopK(4, score="norm"), dictionaries={"shared": free()}),
    "energy": lambda: model(EnergyTopK(), dictionaries=per_modality()),
    "archetypal": lambda: model(ReLU(), dictionaries={"shared": ArchetypalDictionary(F)}),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_folded_norms_leave_the_reconstruction_alone(kind, tmp_path):
    sae = FOLDED[kind]()
    new = fold_decoder_norm(sae)
    same(recon(new), recon(sae), rtol=0, atol=1e-5)
    for m in BOTH:
        norms = sae.dictionary(m).rows().norm(dim=1)
        assert (norms - 1).abs().max() > 0.05
        torch.testing.assert_close(codes(new)[m], codes(sae)[m] * norms, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new.dictionary(m).rows().norm(dim=1), torch.ones(F))
    loaded(new, tmp_path)


def test_folding_changes_what_is_ranked_so_top_k_by_value_refuses():
    for selector in (TopK(4), BatchTopK(4), TopK(4, score="abs")):
        sae = model(selector, dictionaries={"shared": free()})
        with pytest.raises(InputError, match=f"selector {selector.name!r} .score '(value|abs)'. chooses by pre-codes"):
            fold_decoder_norm(sae)
    # the spec's trap, by hand: large errors without, rounding with the rescaled selection
    sae = model(TopK(4), dictionaries={"shared": free()})
    n = sae.dictionary("image").weight.norm(dim=1)
    hand, rescaled = copy.deepcopy(sae), model(TopK(4, score="norm"), dictionaries={"shared": free()})
    for other in (hand, fold_decoder_norm(rescaled)):
        with torch.no_grad():
            if other is hand:
                other.encoder.scale_(n)
                other.dictionary("image").weight.div_(n[:, None])
    error = (recon(hand)["image"] - recon(sae)["image"]).abs().max()
    assert error > 0.1
    same(recon(fold_decoder_norm(rescaled)), recon(rescaled), rtol=0, atol=5e-5)


def test_a_threshold_that_is_not_scaled_is_wrong():
    sae = model(JumpReLU(0.2), dictionaries={"shared": free()})
    new = fold_decoder_norm(sae)
    wrong = copy.deepcopy(new)
    wrong.selector.thresholds = torch.nn.Parameter(sae.selector.threshold("image")[None])
    assert (recon(wrong)["image"] - recon(sae)["image"]).abs().max() > 0.05


def test_norms_of_one_are_left_and_of_zero_too_and_what_reads_atoms_refuses():
    sae = model(TopK(4))  # unit atoms
    same(codes(fold_decoder_norm(sae)), codes(sae))
    sae = model(ReLU(), dictionaries={"shared": free()})
    with torch.no_grad():
        sae.dictionary("image").weight[3] = 0
    new = fold_decoder_norm(sae)
    same(recon(new), recon(sae), rtol=0, atol=1e-5)
    assert torch.equal(codes(new)["image"][:, 3], codes(sae)["image"][:, 3])
    sae = model(ReLU(), GroupBias(), {"shared": ScaledDictionary()})
    with pytest.raises(InputError, match="encoder 'gba' has no weights"):
        fold_decoder_norm(sae)
    with pytest.raises(InputError, match="encoder 'distance' has no weights"):
        fold_decoder_norm(model(ReLU(), DistanceEncoder(), {"shared": free()}))


# with_pursuit


def nonzero(sae):
    return {m: (c != 0).sum(1) for m, c in codes(sae).items()}


@pytest.mark.parametrize("kind", ["mp", "omp", "gp"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: model(JumpReLU(0.2), dictionaries={"shared": free()}),
        lambda: model(BatchTopK(4), PerModalityEncoder(AffineEncoder()), per_modality()),
        lambda: model(TopK(4, score="norm"), dictionaries=per_modality(), normaliser=Normaliser(centre=True)),
        lambda: model(ReLU(), GroupBias(), {"shared": ScaledDictionary()}),
        lambda: model(EnergyTopK(), dictionaries={"shared": free()}),
    ],
)
def test_a_pursuit_spends_at_most_the_rows_own_l0_and_errs_less(make, kind, tmp_path):
    sae = make()
    new = with_pursuit(sae, kind)
    own, found = nonzero(sae), nonzero(new)
    for m in BOTH:
        assert (found[m] <= own[m]).all() and (found[m] > 0).any()
        atoms = sae.dictionary(m).rows()
        torch.testing.assert_close(new.dictionary(m).rows(), atoms / atoms.norm(dim=1, keepdim=True))
        assert fvu(recon(new)[m], X[m]) < 0.8 * fvu(recon(sae)[m], X[m])
    again = loaded(new, tmp_path)
    assert isinstance(again.encoder, PursuitAtL0) and again.encoder.kind == kind
    one = again.encode(X["image"][7:8], "image").to_dense()
    torch.testing.assert_close(one[0], codes(new)["image"][7], rtol=1e-5, atol=1e-6)


def test_rows_that_the_encoder_leaves_empty_stay_empty():
    sae = model(JumpReLU(0.2), dictionaries={"shared": free()})
    x = torch.cat([X["image"][:3], sae.dictionary("image").bias[None]])
    with torch.no_grad():
        sae.encoder.bias.clamp_(max=0)
    assert sae.encode(x, "image").l0()[3] == 0
    for kind in ("mp", "omp", "gp"):
        code = with_pursuit(sae, kind).encode(x, "image")
        assert code.l0()[3] == 0 and (code.l0()[:3] > 0).all()
        assert with_pursuit(sae, kind).encode(x[3:], "image").l0().tolist() == [0]


def test_where_every_row_has_k_latents_its_own_l0_is_that_number():
    sae = model(TopK(4))
    full = nonzero(sae)["image"] == 4
    assert full.sum() > 100
    for kind in ("mp", "omp", "gp"):
        own, fixed = (codes(with_pursuit(sae, kind, l0))["image"][full] for l0 in ("model", 4))
        held = (fixed != 0).sum(1) == 4  # others were clipped or chose an atom twice
        torch.testing.assert_close(own[held], fixed[held])
        assert held.sum() > 10


def test_a_fixed_number_and_signs():
    sae = model(TopK(4, score="abs"), dictionaries={"shared": free()})
    new = with_pursuit(sae, "omp", 3)
    assert isinstance(new.encoder, PursuitEncoder) and not isinstance(new.encoder, PursuitAtL0)
    assert new.encoder.steps == 3 and (nonzero(new)["image"] <= 3).all() and (codes(new)["image"] < 0).any()
    assert (codes(with_pursuit(sae, "gp"))["text"] < 0).any()
    assert not (codes(with_pursuit(model(TopK(4)), "gp"))["text"] < 0).any()
    for l0 in (0, 2.5, "own"):
        with pytest.raises(InputError, match="l0 must be"):
            with_pursuit(sae, "gp", l0)
    with pytest.raises(InputError, match="kind of a pursuit"):
        with_pursuit(sae, "nnls")


def test_a_pursuit_refuses_scaled_atoms_and_counts_while_it_trains():
    with pytest.raises(InputError, match="'shared' is 'scaled'"):
        SAE(D, F, encoder=PursuitEncoder(), dictionaries={"shared": ScaledDictionary()})
    sae = model(BatchTopK(4))
    new = with_pursuit(sae).train().requires_grad_()
    new({m: x * 3 for m, x in X.items()})
    same({"s": new.encoder.selector.sum_}, {"s": sae.selector.sum_})  # it observes nothing


# truncate


@pytest.mark.parametrize(
    "make",
    [
        lambda: model(JumpReLU(0.1), PerModalityEncoder(AffineEncoder()), per_modality()),
        lambda: model(BatchTopK(4), GatedEncoder(), {"shared": free()}),
        lambda: to_jumprelu(model(BatchTopK(4, score="norm"), dictionaries=per_modality())),
        lambda: model(ReLU(), GroupBias(groups=3), {"shared": ScaledDictionary()}),
        lambda: model(FeatureChoice(4), dictionaries=per_modality()),
    ],
)
@pytest.mark.parametrize("prefix", [D, 5])
def test_a_prefix_has_the_first_columns_of_the_code(make, prefix, tmp_path):
    sae = make()
    new = truncate(sae, prefix)
    same(codes(new), {m: c[:, :prefix] for m, c in codes(sae).items()}, rtol=1e-5, atol=1e-6)
    for m in BOTH:
        assert torch.equal(new.dictionary(m).rows(), sae.dictionary(m).rows()[:prefix])
    loaded(new, tmp_path).train()({m: x[:40] for m, x in X.items()})  # what it needs in training is of its size, too


def test_the_whole_prefix_is_the_sae_and_top_k_counts_among_what_is_left():
    sae = model(TopK(4), dictionaries=per_modality())
    same(recon(truncate(sae, F)), recon(sae))
    new = truncate(sae, 6)
    assert (nonzero(new)["image"] >= (codes(sae)["image"][:, :6] != 0).sum(1)).all()
    assert truncate(sae, 3).selector.k == 3 and truncate(model(TopK(4, strict=True)), 3).selector.k == 2
    assert sae.selector.k == 4 and sae.d_sae == F
    state = torch.get_rng_state()
    truncate(sae, 7)
    assert torch.equal(torch.get_rng_state(), state)
    for prefix in (0, F + 1):
        with pytest.raises(InputError, match=f"d_sae = {F}, not {prefix}"):
            truncate(sae, prefix)


# calibrate_scale


def shrunk(sae, share):
    """The same SAE with atoms of another length."""
    sae = copy.deepcopy(sae)
    with torch.no_grad():
        for m, d in sae.dictionaries.items():
            d.weight.mul_(share[m] if isinstance(share, dict) else share)
    return sae


def test_a_known_shrinkage_is_found_and_undone(tmp_path):
    """Atoms that were shortened by known factors come back to the length that is best, and no codes change."""
    base = calibrate_scale(model(ReLU(), dictionaries=per_modality()), X)
    sae = shrunk(base, {"image": 0.8, "text": 0.5})
    new = calibrate_scale(sae, X)
    same(codes(new), codes(sae))
    same(recon(new), recon(base), rtol=0, atol=1e-5)
    loaded(new, tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: model(TopK(4)),
        lambda: model(BatchTopK(4, score="norm"), dictionaries=per_modality()),
        lambda: model(ReLU(), normaliser=Normaliser(unit_in=True, centre=True, unit_out=True)),
        lambda: model(ReLU(), GroupBias(), {"shared": ScaledDictionary()}),
        lambda: model(ReLU(), dictionaries={"shared": ArchetypalDictionary(F)}),
    ],
)
def test_no_other_scale_of_the_reconstruction_is_better(make, tmp_path):
    sae = make()
    new = loaded(calibrate_scale(sae, X), tmp_path)
    same(codes(new), codes(sae))
    a, b = recon(sae), recon(new)
    keys = [[m] for m in BOTH] if len(sae.dictionaries) > 1 else [BOTH]
    for own in keys:
        at = lambda share, own=own: sum(fvu(a[m] + share * (b[m] - a[m]), X[m]) for m in own)  # noqa: E731
        best = at(1.0)
        assert best < at(0.9) and best < at(1.1) and best < at(0.0)


def test_a_dictionary_of_activations_is_cut_and_coded_by_other_pursuits():
    sae = SAE(
        D, F, None, ["image"], encoder=PursuitEncoder("mp", 4, "abs"), dictionaries={"shared": GrowingDictionary()}
    )
    sae.dictionary("image").weight[:20] = torch.nn.functional.normalize(X["image"][:20])
    sae.dictionary("image").size_.fill_(20)
    new = truncate(sae, 12)
    assert new.dictionary("image").size == 12 and truncate(sae, 30).dictionary("image").size == 20
    assert (codes(with_pursuit(sae.eval(), "omp"))["image"] < 0).any()
    x = X["image"]
    assert fvu(recon(with_pursuit(sae, "omp"))["image"], x) < fvu(recon(sae)["image"], x)


def test_scales_that_have_no_meaning_are_refused():
    with pytest.raises(InputError, match="no text rows"):
        calibrate_scale(model(ReLU()), {"image": X["image"]})
    with pytest.raises(InputError, match="'energy_topk' goes by"):
        calibrate_scale(model(EnergyTopK()), X)
    with pytest.raises(InputError, match="'pursuit' reads the atoms"):
        calibrate_scale(with_pursuit(model(ReLU()), "mp", 4), X)
    sae = model(ReLU())
    with torch.no_grad():
        sae.dictionary("image").weight.neg_()
        sae.encoder.weight.copy_(-sae.dictionary("image").weight)
    with pytest.raises(InputError, match="best scale of dictionary 'shared' is -"):
        calibrate_scale(sae, X)

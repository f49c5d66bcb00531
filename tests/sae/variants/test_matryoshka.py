import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import BatchTopK, LossContext, NestedReconstruction, NestedTopK, Reconstruction, ReLU, TopK
from mmsae.sae.variants.matryoshka import prefix_parts
from tests.helpers.recipes import batch


def small(selector, d_sae=48):
    torch.manual_seed(0)
    sae = SAE(16, d_sae, modalities=["image"], selector=selector)
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    return sae.train()


def outputs(sae, n=64):
    return sae(batch(sae, n))


@pytest.mark.parametrize("selector", [BatchTopK(4), ReLU()], ids=["sparse", "dense"])
def test_a_prefix_uses_no_latent_beyond_it_and_all_levels_cost_one_decoding(selector):
    sae = small(selector)
    out = outputs(sae)["image"]
    dictionary = sae.dictionary("image")
    codes = out.codes.to_dense()
    for widths in ([5, 17, 48], [1, 2, 47], [48]):
        parts = list(prefix_parts(out.codes, dictionary.rows(), widths))
        levels = NestedReconstruction(prefixes=[w for w in widths if w > 1]).levels(out, "image", LossContext(sae))
        for part, start, end in zip(parts, [0, *widths], widths, strict=False):
            torch.testing.assert_close(part, codes[:, start:end] @ dictionary.rows()[start:end], atol=1e-6, rtol=1e-5)
        for level, width in zip(levels, [w for w in widths if w > 1], strict=False):
            want = codes[:, :width] @ dictionary.rows()[:width] + dictionary.bias
            torch.testing.assert_close(level, want, atol=1e-6, rtol=1e-5)
            gradient = torch.autograd.grad(level.square().sum(), dictionary.weight, retain_graph=True)[0]
            assert not gradient[width:].any() and gradient[:width].any()
        assert levels[-1] is out.recon


def test_levels_are_averaged_once_and_given_weights_are_taken_as_they_are():
    sae = small(BatchTopK(4))
    out, context = outputs(sae), LossContext(sae)
    term = NestedReconstruction(prefixes=[0.25, 0.5])
    x, unit = out["image"].target, sae.normaliser.variance("image")
    errors = [(x - r).square().sum(1).mean() / unit for r in term.levels(out["image"], "image", context)]
    torch.testing.assert_close(term(out, context), sum(errors) / 3)
    weighted = NestedReconstruction(prefixes=[12, 24], weights=[2.0, 0.0, 1.0])(out, context)
    torch.testing.assert_close(weighted, 2 * errors[0] + errors[2])
    with pytest.raises(InputError, match="3 levels and 2 weights"):
        NestedReconstruction(prefixes=[0.25, 0.5], weights=[1.0, 1.0])(out, context)


def test_drawn_prefixes_follow_the_law_and_the_step_alone():
    sae = small(BatchTopK(4), d_sae=64)
    term = NestedReconstruction(sampled=4)
    drawn = [term.widths(LossContext(sae, step=i)) for i in range(2000)]
    assert drawn[:50] == [term.widths(LossContext(sae, step=i)) for i in range(50)]
    assert all(w[-1] == 64 and w == sorted(set(w)) and len(w) == 4 for w in drawn)
    two = NestedReconstruction(sampled=2)
    ones = sum(two.widths(LossContext(sae, step=i))[0] == 1 for i in range(4000)) / 4000
    assert ones == pytest.approx((1 - 2**-0.5) / (1 - 64**-0.5), abs=0.025)


def test_largest_entries_are_nested_and_the_last_level_is_the_code():
    sae = small(TopK(8))
    out = outputs(sae)["image"]
    levels = NestedTopK().levels(out, "image", LossContext(sae))
    u = out.pre.dense().relu()
    dictionary = sae.dictionary("image")
    for level, k in zip(levels, (1, 2, 4, 8), strict=True):
        top = u.topk(k)
        want = torch.zeros_like(u).scatter(1, top.indices, top.values) @ dictionary.rows() + dictionary.bias
        torch.testing.assert_close(level, want, atol=1e-6, rtol=1e-5)
    assert levels[-1] is out.recon


def test_multi_topk_recodes_with_the_same_rule_and_more_entries():
    for score in ("value", "abs"):
        sae = small(TopK(4, score=score))
        out = outputs(sae)
        with torch.no_grad():
            sae.selector.set_k(16)
            wide = Reconstruction()(outputs(sae), LossContext(sae))
            sae.selector.set_k(4)
            got = NestedTopK([4.0], [0.125])(out, LossContext(sae))
        torch.testing.assert_close(got, wide / 8, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NestedReconstruction([0.5], sampled=3), r"give prefixes \(\[0.5\]\) or sampled \(3\)"),
        (lambda: NestedReconstruction([0.5, 0.25]), "increase"),
        (lambda: NestedReconstruction([64, 99]).widths(LossContext(small(TopK(4)))), "99 latents does not fit"),
        (lambda: NestedReconstruction(sampled=50).widths(LossContext(small(TopK(4)))), "50 prefixes"),
        (lambda: NestedTopK([]), "increase"),
        (lambda: NestedTopK()(outputs(s := small(BatchTopK(4))), LossContext(s)), "not 'batch_topk'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()

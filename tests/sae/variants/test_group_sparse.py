"""Group sparsity and pair masks against the oracles of multimodal_saes, section 3."""

import copy

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import Dictionary, GroupSparse, PairMask, ReLU, TopK
from mmsae.sae.variants.group_sparse import group_norm
from tests.helpers.pairs import as_codes, context, outputs_of, random_codes
from tests.helpers.recipes import batch

both = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


def norm(z, w, sparse=True):
    return group_norm(as_codes(z, sparse), as_codes(w, sparse)).tolist()


@both
def test_it_is_twice_the_l1_on_disjoint_supports_and_root_two_on_equal_codes(sparse):
    z = random_codes(30, 12, 3)
    l1 = z.sum(1)
    assert norm(torch.cat([z, 0 * z], 1), torch.cat([0 * z, z], 1), sparse) == pytest.approx((2 * l1).tolist())
    assert norm(z, z, sparse) == pytest.approx((2**0.5 * l1).tolist())
    assert norm([[3.0, 2, 0, 1]], [[3.0, 0, 2, 1]], sparse) == pytest.approx([9.6569], abs=1e-4)


def test_sparse_and_dense_codes_have_one_norm_and_finite_gradients():
    z, w = random_codes(30, 12, 3, 0) - 0.1, random_codes(30, 12, 3, 1)
    assert norm(z, w) == pytest.approx(norm(z, w, False), rel=1e-5)
    grads = []
    for sparse in (True, False):
        a = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        total = group_norm(as_codes(a, sparse), as_codes([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]], sparse)).sum()
        grads.append(torch.autograd.grad(total, a)[0])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(grads[0], torch.tensor([[0.0, 2**-0.5, 0.0], [0.0, 0.0, 0.0]]))


def test_the_term_is_the_mean_over_pairs_in_units_of_the_data():
    z, w = random_codes(seed=0), random_codes(seed=1)
    ctx = context(12)
    for m in ("image", "text"):
        ctx.sae.normaliser.variance(m).fill_(4.0)
    got = GroupSparse(0.3)(outputs_of(z, w), ctx)
    assert float(got) == pytest.approx(0.3 * sum(norm(z, w)) / 40 / 2, rel=1e-5)
    assert float(GroupSparse(0.3)(outputs_of(z, w), ctx._replace(progress=0.05))) == pytest.approx(float(got) / 2)


def test_it_refuses_rows_without_partners_and_atoms_that_may_grow():
    z = random_codes()
    with pytest.raises(InputError, match=r"group_sparse needs pairs.*\{'image': 40, 'text': 39\}"):
        GroupSparse()(outputs_of(z, z[1:]), context(12))
    for dictionary in (Dictionary("free"), Dictionary("ball")):
        sae = SAE(8, 12, selector=ReLU(), dictionaries={"shared": dictionary})
        with pytest.raises(InputError, match=f"norm 'unit'.*'shared' is 'dictionary' of norm '{dictionary.norm}'"):
            GroupSparse().check(sae)
    GroupSparse().check(context(12).sae)


def small(selector, d_sae=48):
    torch.manual_seed(0)
    sae = SAE(16, d_sae, selector=selector)
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    return sae.train()


def fired(sae, tokens):
    return [out.codes.to_dense() != 0 for out in sae(tokens).values()]


def test_both_rows_of_a_pair_leave_out_the_same_latents_and_nothing_is_left_out_in_evaluation():
    sae, plain = small(PairMask(40, rate=0.5)), small(TopK(40))
    tokens = batch(sae, 64)
    left_out = PairMask(40, rate=0.5)._draw(64, 48, torch.device("cpu"))  # the first mask of seed 0
    assert float(left_out.float().mean()) == pytest.approx(0.5, abs=0.03)
    for on, out in zip(fired(sae, tokens), sae(tokens).values(), strict=True):
        assert torch.equal(on, (out.pre.dense() > 0) & ~left_out) and on.any()  # k is more than what is left
    assert sae.selector._batches == 2
    for a, b in zip(fired(sae.eval(), tokens), fired(plain.eval(), tokens), strict=True):
        assert torch.equal(a, b)
    assert sae.selector._batches == 2


@pytest.mark.parametrize("score", ["value", "abs"])
def test_what_is_kept_are_the_largest_of_what_is_left(score):
    sae = small(PairMask(4, rate=0.3, score=score))
    tokens = batch(sae, 64)
    out = sae(tokens)
    left_out = PairMask(4, rate=0.3)._draw(64, 48, torch.device("cpu"))
    for o in out.values():
        u = o.pre.dense() * ~left_out
        ranked = u.abs() if score == "abs" else u.relu()
        want = torch.zeros_like(u).scatter(1, ranked.topk(4).indices, 1.0) * (u if score == "abs" else u.relu())
        torch.testing.assert_close(o.codes.to_dense(), want)


def test_masks_differ_by_batch_and_seed():
    sae, other = small(PairMask(4)), small(PairMask(4, seed=1))
    tokens = batch(sae, 64)
    drawn = [fired(sae, tokens)[0], fired(sae, tokens)[0], fired(other, tokens)[0]]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_mask_is_that_of_the_batch_that_a_resumed_training_goes_on_with():
    sae = small(PairMask(4))
    tokens = batch(sae, 64)
    sae(tokens)
    state = copy.deepcopy(sae.state_dict())
    want = fired(sae, tokens)
    again = small(PairMask(4))
    again.load_state_dict(state)
    for a, b in zip(fired(again, tokens), want, strict=True):
        assert torch.equal(a, b)


def test_a_mask_needs_pairs_in_training():
    sae = small(PairMask(4))
    tokens = batch(sae, 8)
    with pytest.raises(InputError, match=r"selector 'pair_mask' in training needs pairs.*not \{'image': 8\}"):
        sae({"image": tokens.x["image"]})
    with pytest.raises(InputError, match=r"\{'image': 8, 'text': 7\}"):
        sae({"image": tokens.x["image"], "text": tokens.x["text"][1:]})
    assert sae.eval().encode(tokens.x["image"], "image").n == 8
    with pytest.raises(InputError, match=r"two modalities, not \['image'\]"):
        SAE(8, 12, modalities=["image"], selector=PairMask(4))
    with pytest.raises(InputError, match=r"rate .* below 1, not 1.0"):
        PairMask(4, rate=1.0)

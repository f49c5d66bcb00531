"""Contrastive codes: multimodal_saes, section 7."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import CodeInfoNCE, TopK
from mmsae.sae.aligner import info_nce
from tests.helpers.pairs import context, outputs_of, random_codes


def value(z, w, sparse=True, **kw):
    ctx = context(z.shape[1])
    return CodeInfoNCE(1.0, **kw)(outputs_of(z, w, sparse=sparse), ctx)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("normalise", [True, False], ids=["cosine", "product"])
def test_it_is_the_contrastive_loss_of_dense_codes_with_its_gradients(sparse, normalise):
    grads = []
    for name in ("ours", "dense"):
        z, w = random_codes(seed=0).requires_grad_(), random_codes(seed=1).requires_grad_()
        loss = value(z, w, sparse, tau=0.3, normalise=normalise) if name == "ours" else info_nce(z, w, 0.3, normalise)
        grads.append((loss, *torch.autograd.grad(loss, (z, w))))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_codes_that_are_all_alike_cannot_be_told_apart():
    z = torch.ones(16, 4)
    assert float(value(z, z)) == pytest.approx(torch.tensor(16.0).log().item(), rel=1e-5)
    own = torch.eye(16)
    assert float(value(own, own, tau=0.01)) == pytest.approx(0.0, abs=1e-6)
    assert float(value(own, own.roll(1, 0), tau=0.01)) > 50


def test_the_order_of_pairs_is_of_no_account_and_empty_codes_have_finite_gradients():
    z, w = random_codes(seed=0), random_codes(seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(value(z[order], w[order]), value(z, w))
    z[3], w[5] = 0.0, 0.0
    z.requires_grad_()
    (grad,) = torch.autograd.grad(value(z, w), z)
    assert torch.isfinite(grad).all()


def test_it_ramps_and_refuses_signs_and_rows_without_partners():
    z, w = random_codes(seed=0), random_codes(seed=1)
    out = outputs_of(z, w)
    full = float(CodeInfoNCE()(out, context(12)))
    assert float(CodeInfoNCE()(out, context(12, progress=0.05))) == pytest.approx(full / 2)
    with pytest.raises(InputError, match=r"code_info_nce needs pairs.*\{'image': 40, 'text': 39\}"):
        value(z, w[1:])
    with pytest.raises(InputError, match="non-negative codes: those of 'topk' have signs"):
        CodeInfoNCE().check(SAE(8, 12, selector=TopK(2, score="abs")))
    CodeInfoNCE().check(SAE(8, 12, selector=TopK(2)))
    with pytest.raises(InputError, match="tau must be above 0, not 0"):
        CodeInfoNCE(tau=0)

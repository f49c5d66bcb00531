"""Which features to steer, and what steering a planted one does."""

import pytest
import torch
from torch import nn

from mmsae import InputError
from mmsae.hosts import load_host
from mmsae.sae import SAE, TopK
from mmsae.steering import Edit, Intervention
from mmsae.steering.measure.images import dose_response
from mmsae.steering.methods.choose_features import attribute, attribution, contrast, gradient
from mmsae.types import Codes
from tests.helpers.encoders import MODELS, save_local
from tests.helpers.steer_saes import COMPOSITIONS, items, make


def planted(n=200, d_sae=30, feature=12, seed=0):
    """Codes where one feature fires on the target only, and one fires for a single target row, hugely."""
    g = torch.Generator().manual_seed(seed)
    both = [(torch.rand(n, d_sae, generator=g) < 0.2) * torch.rand(n, d_sae, generator=g) for _ in range(2)]
    both[0][:, feature], both[1][:, feature] = 0.5, 0.0
    both[0][:, 7] = both[1][:, 7] = 0.0
    both[0][0, 7] = 500.0
    return [Codes(z, None, d_sae) for z in both]


@pytest.mark.parametrize("by", ["mean", "rate"])
def test_contrast_finds_the_planted_feature_and_the_holdout_drops_an_outlier(by):
    target, background = planted()
    got = contrast(target, background, by=by)
    assert int(got.ids[0]) == 12 and 7 not in got.ids and (got.score > 0).all() and (got.holdout > 0).all()
    assert len(got.top(1).ids) == 1
    naive = contrast(target, background, by=by, holdout=0)
    assert naive.holdout is None and (by == "rate" or int(naive.ids[0]) == 7)
    sparse = [Codes(c.values.topk(10).values, c.values.topk(10).indices, 30) for c in (target, background)]
    full = [Codes(c.to_dense(), None, 30) for c in sparse]
    assert torch.equal(contrast(*sparse, by=by).ids, contrast(*full, by=by).ids)
    if by == "rate":  # a latent of signed codes fires at either pole
        turned = [c._replace(values=-c.values) for c in (target, background)]
        assert torch.equal(contrast(*turned, by=by).ids, got.ids)
    with pytest.raises(InputError, match="1 rows"):
        contrast(target.rows(slice(1)), background)
    with pytest.raises(InputError, match="not one of"):
        contrast(target, background, by="max")


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_one_backward_pass_equals_ablation_where_the_host_is_linear(name):  # T22
    sae, x = make(name)
    head = torch.randn(16, generator=torch.Generator().manual_seed(3))

    def loss(rows):
        return (rows @ head).sum()

    codes = sae.encode(x, "image")
    a = attribution(sae, codes, head.expand_as(x))
    for i in codes.indices[:3].flatten().tolist():
        gone = Intervention(Edit.ablate(i), unit="raw").apply(sae, x, "image")
        assert a[i].item() == pytest.approx((loss(x) - loss(gone)).item(), abs=2e-3)
        eps = 1e-2
        step = [Intervention(Edit.scale(i, 1 + s), unit="raw").apply(sae, x, "image").double() for s in (eps, -eps)]
        slope = ((step[0] - step[1]) @ head.double()).sum() / (2 * eps)  # dL/dg of z_i -> g z_i
        assert a[i].item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-2)
    by_item = attribution(sae, codes, head.expand_as(x), torch.arange(64) % 5)
    assert by_item.shape == (5, 48) and torch.allclose(by_item.sum(0), a, atol=1e-4)
    dense = Codes(codes.to_dense(), None, 48, "image", codes.info)
    assert torch.allclose(attribution(sae, dense, head.expand_as(x)), a, atol=1e-4)


def test_attribution_on_a_host(tmp_path):  # T22: image.pooled is followed by a projection, a linear head
    host = load_host(save_local(tmp_path / "vit", MODELS["vit"]))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sae = SAE(32, 64, modalities=["image"], selector=TopK(5)).eval().requires_grad_(False)
    head = torch.randn(16)

    def loss(out):
        return (out @ head).sum()

    x, grad, where = gradient(host, "image.pooled", lambda: host.model.encode_image(images), loss)
    assert x.shape == grad.shape == (3, 32) and len(where.item) == 3
    assert torch.allclose(grad, (host.model.visual.proj @ head).expand(3, -1), atol=1e-5)
    got = attribute(host, "image.pooled", sae, lambda: host.model.encode_image(images), loss, n=4)
    assert (got.score.abs().diff() <= 0).all() and len(got.ids) == 4
    clean = loss(host.encode_image(images))
    for i, a in zip(got.ids.tolist(), got.score.tolist(), strict=True):
        with host.edit("image.pooled", Intervention(Edit.ablate(i), unit="raw").bind(sae), where=True):
            assert a == pytest.approx((clean - loss(host.encode_image(images))).item(), abs=1e-3)
    with pytest.raises(InputError, match="without gradients"):
        gradient(host, "image.pooled", lambda: host.encode_image(images), loss)
    with pytest.raises(InputError, match="computed 0 times"):
        gradient(host, "image.pooled", lambda: torch.zeros(1, 16), loss)
    assert all(p.grad is None for p in host.model.parameters())


def test_gradients_pass_an_edit_that_is_attached_downstream():
    sae, x = make("topk")
    x = x.clone().requires_grad_()
    new = Intervention(Edit.add(3, 2.0), unit="rel_norm").bind(sae)(x, items(64))
    (grad,) = torch.autograd.grad(new.sum(), x)
    assert torch.isfinite(grad).all() and (grad != 0).any()


class Planted(nn.Module):
    """A nonlinear host with one direction that its score reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.read = nn.functional.normalize(torch.randn(16), dim=0)

    def score(self, x):
        return (x @ self.read) + 0.01 * self.body(x).sum(1)


@torch.no_grad()
def test_dose_response_of_a_planted_concept_is_monotone_and_of_random_ones_is_not():  # T25
    host, (sae, x) = Planted(), make("topk")
    sae.dictionary("image").weight[5] = host.read
    doses = [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]

    def curve(i):
        return [host.score(iv.apply(sae, x)).mean().item() for iv in
                Intervention(Edit.add(i, 1.0), unit="rel_norm").vary(strength=doses)]  # fmt: skip

    own = curve(5)
    assert dose_response(doses, own).means == pytest.approx(dict(zip(doses, own, strict=True)))
    assert dose_response(doses, own)[0] == pytest.approx(1.0)
    controls = torch.tensor([curve(i) for i in range(6, 46)])
    rise = controls[:, -1] - controls[:, 0]
    assert own[-1] - own[0] > rise.abs().max() and abs(rise.mean()) < 0.1 * (own[-1] - own[0])

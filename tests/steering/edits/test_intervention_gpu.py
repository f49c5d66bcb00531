"""Interventions on a GPU agree with the CPU."""

import pytest
import torch

from mmsae import InputError
from mmsae.hosts.sites import COND, Where
from mmsae.steering import Edit, FeatureStats, Intervention
from tests.helpers.steer_saes import AFFINE, items, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EDIT = Edit.set([3, 7], [2.0, 1.0]) + Edit.scale(11, -3) + Edit.swap(5, [0.5])


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("more", [{}, {"policy": "pre"}, {"policy": "budget"}, {"writeback": "splice"}, {"guard": 0.9}])
def test_agrees_with_the_cpu(name, more):
    sae, x = make(name)
    stats = FeatureStats.of_codes([sae.encode(x, "image")])
    where = Where(torch.arange(4).repeat_interleave(16), torch.arange(16).repeat(4), grid=(4, 4),
                  branch=torch.full((64,), COND), special=torch.zeros(64, dtype=torch.bool))  # fmt: skip
    iv = Intervention(EDIT, unit="raw", stats=stats, space=[[1.0, 0.5], [0.0, 0.25]], **more)
    want = iv.bind(sae, "image")(x, where)
    there = Where(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in where))
    got = iv.bind(sae.cuda(), "image")(x.cuda(), there)
    assert torch.allclose(got.cpu(), want, atol=1e-3)


def test_an_sae_elsewhere_is_refused():
    sae, x = make("topk")
    with pytest.raises(InputError, match="the SAE is on cpu"):
        Intervention(EDIT, unit="raw").bind(sae)(x.cuda(), Where(items(64).item.cuda()))

import numpy as np
import torch

from mmsae.world.models.loop import Muon, optimizers, orthogonal, schedule
from mmsae.world.models.options import Training


def test_orthogonal_keeps_the_singular_vectors_and_brings_values_near_one():
    g = torch.Generator().manual_seed(0)
    for shape in ((6, 40), (40, 6), (10, 10)):
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
        s = torch.linspace(1, 0.2, len(v))
        out = orthogonal(u @ torch.diag(s) @ v)
        core = u.T @ out @ v.T
        assert (core.diag() > 0.6).all() and (core.diag() < 1.3).all()
        assert (core - core.diag().diag()).abs().max() < 1e-3


def test_muon_step_is_a_decayed_weight_minus_a_scaled_orthogonal_update():
    p = torch.nn.Parameter(torch.ones(4, 2, 3, 3))
    start, grad = p.detach().clone(), torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    p.grad = grad.clone()
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    nesterov = grad.lerp(0.1 * grad, 0.9)  # momentum starts from zero
    want = start * (1 - 0.05) - 0.1 * 0.2 * 18**0.5 * orthogonal(nesterov.flatten(1)).reshape(p.shape)
    assert torch.allclose(p, want, atol=1e-6)


def test_schedule_warms_up_and_decays():
    values = np.array([schedule(s, 200) for s in range(200)])
    assert values[0] == 1 / 20 and values[19] == 1 and values.argmax() in (19, 20)
    assert (np.diff(values[20:]) < 0).all() and 0.02 < values[-1] < 0.025
    assert all(0 < schedule(0, n) <= 1 for n in (1, 2, 20))


def test_every_parameter_has_exactly_one_optimizer():
    model = torch.nn.Module()
    model.token_embedding = torch.nn.Embedding(5, 4)
    model.conv = torch.nn.Conv2d(3, 4, 3)
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    opts = optimizers(model.named_parameters(), ("embedding",), Training(10))
    held = [id(p) for o in opts for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert [id(p) for g in opts[0].param_groups for p in g["params"]] == [id(model.conv.weight)]

"""The step on rows against torch.optim.Adam, with projection and renormalisation around it."""

import pytest
import torch

from mmsae.kernels.triton import optim
from mmsae.sae.dictionary import Dictionary

ADAM = dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8)


def start(n, d, device):
    g = torch.Generator().manual_seed(0)
    dictionary = Dictionary(norm="unit", bias=False)
    dictionary.build(d, n)
    dictionary.weight.data = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1).to(device)
    grads = [torch.randn(n, d, generator=g).mul(10.0**-s).to(device) for s in range(5)]
    return dictionary, grads


@pytest.mark.parametrize(("n", "d"), [(1, 2), (4, 7), (3, 100), (2, 257), (3, 1000)])
@pytest.mark.parametrize("tangent", [False, True])
def test_steps_are_those_of_torch(device, n, d, tangent):
    dictionary, grads = start(n, d, device)
    weight, mean, square = dictionary.weight.detach().clone(), *torch.zeros(2, n, d, device=device)
    adam = torch.optim.Adam([dictionary.weight], ADAM["lr"], (ADAM["beta1"], ADAM["beta2"]), ADAM["eps"])
    version = weight._version
    for step, grad in enumerate(grads, 1):
        dictionary.weight.grad = grad.clone()
        if tangent:
            dictionary.remove_parallel_grad_()
        adam.step()
        dictionary.project_()
        optim.adam_rows_(weight, grad, mean, square, step, **ADAM, tangent=tangent)
        torch.testing.assert_close(weight, dictionary.weight.data, rtol=1e-6, atol=1e-6)
    state = adam.state[dictionary.weight]
    assert (mean - state["exp_avg"]).norm() <= 2e-6 * state["exp_avg"].norm()
    assert (square - state["exp_avg_sq"]).norm() <= 2e-6 * state["exp_avg_sq"].norm()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(n, device=device), rtol=1e-6, atol=0)
    assert weight._version == version + len(grads)  # autograd notices


def test_one_step_is_that_of_torch_in_float64(device):
    dictionary, (grad, *_) = start(5, 300, device)
    ours, mean, square = dictionary.weight.detach().clone(), *torch.zeros(2, 5, 300, device=device)
    weight = ours.double().requires_grad_()
    weight.grad = grad.double()
    torch.optim.Adam([weight], 0.01).step()
    optim.adam_rows_(ours, grad, mean, square, 1, **ADAM, tangent=False)
    want = torch.nn.functional.normalize(weight.detach())
    assert ((ours - want).norm(dim=1)).max() < 3e-7


def test_rows_of_zeros_stay_finite(device):
    weight, mean, square = torch.zeros(3, 2, 9, device=device)
    optim.adam_rows_(weight, torch.zeros_like(weight), mean, square, 1, **ADAM, tangent=True)
    assert not weight.any() and not mean.any() and not square.any()


def test_gradients_of_half_precision_and_no_rows(device):
    weight, mean, square = torch.zeros(3, 2, 9, device=device)
    optim.adam_rows_(weight, torch.ones_like(weight).bfloat16(), mean, square, 1, **ADAM, tangent=False)
    torch.testing.assert_close(weight, torch.full_like(weight, -1 / 3))
    empty = weight[:0]
    optim.adam_rows_(empty, empty, empty, empty, 1, **ADAM, tangent=True)


def test_other_shapes_and_strides_are_refused(device):
    weight, mean, square = torch.zeros(3, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"grad must be contiguous and \(4, 4\), not \(4, 3\)"):
        optim.adam_rows_(weight, weight[:, :3], mean, square, 1, **ADAM, tangent=True)
    with pytest.raises(ValueError, match="exp_avg must be contiguous"):
        optim.adam_rows_(weight, weight, mean.t(), square, 1, **ADAM, tangent=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("d", [512, 768, 1024, 4096])
def test_steps_at_sizes_of_trainings(d):
    test_steps_are_those_of_torch("cuda", 6144, d, True)

"""Which backend computes: by the device, by ``MMSAE_KERNELS``, by ``use``."""

import warnings

import pytest
import torch

from mmsae import InputError
from mmsae.kernels import backend_for, choice, sparse_decode, use

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice._without_triton.cache_clear()
    yield
    choice._without_triton.cache_clear()


def test_the_cpu_has_torch_and_the_nearest_word_wins(monkeypatch):
    x = torch.zeros(1)
    assert backend_for(x).name == "torch"
    monkeypatch.setenv(choice.VARIABLE, "reference")
    assert backend_for(x).name == "reference" and choice.described(CPU) == "reference"
    with use("torch"):
        assert backend_for(x).name == "torch"
        with use("reference"):
            assert backend_for(x).name == "reference"
        assert backend_for(x).name == "torch"
    assert backend_for(x).name == "reference"


def test_a_backend_that_there_is_not(monkeypatch):
    with pytest.raises(InputError, match="use must be one of reference, torch, triton, not 'cuda'"), use("cuda"):
        pass
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(InputError, match="MMSAE_KERNELS must be one of reference, torch, triton, not 'fast'"):
        backend_for(torch.zeros(1))


def test_where_triton_cannot_compute_torch_does_and_says_why_once():
    x = torch.zeros(1)
    with use("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.warns(UserWarning, match="for cpu are those of torch"):
            assert backend_for(x).name == "torch"
        assert choice.described(CPU).startswith("torch (Triton")
        assert backend_for(x).name == "torch"  # a second warning would be an error here


def test_an_old_device_has_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    assert choice._why_not(torch.device("cuda")) == "Triton's need compute capability 8.0, not 7.5"
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choice._why_not(torch.device("cuda")) == "Triton is not installed"


def test_gradients_are_of_the_backend_that_computed_the_values():
    values, ids, atoms = torch.ones(2, 2), torch.tensor([[0, 1], [1, 2]]), torch.randn(4, 3, requires_grad=True)
    with use("reference"):
        dense = sparse_decode(values, ids, atoms)
    assert type(dense.grad_fn).__name__ == "MmBackward0"
    assert type(sparse_decode(values, ids, atoms).grad_fn).__name__ == "_DecodeBackward"

"""Hosts whose weights are read from files, without first drawing random ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

# the first argument is filled; within a function that torch hands over whole, no other is seen
_KINDS = ("uniform", "normal", "trunc_normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal")
_IN_PLACE = {Tensor.normal_, Tensor.uniform_, nn.init.orthogonal_, *(getattr(nn.init, f"{k}_") for k in _KINDS)}
# (sizes or what they are like, options) as the function of random numbers takes them, of which a generator is left out
_FRESH = {torch.randn: torch.empty, torch.rand: torch.empty}
_FRESH |= {torch.randn_like: torch.empty_like, torch.rand_like: torch.empty_like}


class Undrawn(TorchFunctionMode):
    """While open, what would be filled with random numbers is filled with NaN, which costs a tenth."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_floating_point():
                with torch.no_grad():
                    return tensor.fill_(torch.nan)
        if func in _FRESH and "out" not in kwargs:
            made = _FRESH[func](*args, **{k: v for k, v in kwargs.items() if k != "generator"})
            with torch.no_grad():
                return made.fill_(torch.nan)
        return func(*args, **kwargs)


def load_undrawn(load: Callable[[], T], model_of: Callable[[T], nn.Module]) -> T:
    """What ``load`` gives, bit for bit, at less cost where no weight of it is random.

    It is called with nothing drawn. If then a NaN is left anywhere in the model, or if a random number was drawn by
    other means, it is called again as it is. What a model makes of comparisons of its initial weights, and keeps beside
    its files, would not be seen; no model is known that does.

    Args:
        load: Makes a model and reads its weights; draws from torch's global generator of the CPU only.
        model_of: The model of what it gives.
    """
    before = torch.get_rng_state()
    with Undrawn():
        made = load()
    if torch.equal(before, torch.get_rng_state()) and not _has_nan(model_of(made)):
        return made
    torch.set_rng_state(before)
    return load()


def _has_nan(model: nn.Module) -> bool:
    """Whether a parameter or a buffer, also one that is not saved, holds a NaN; infinities may count as one."""
    tensors = [*model.parameters(), *model.buffers()]
    return any(bool(t.sum().isnan()) for t in tensors if t.is_floating_point() or t.is_complex())

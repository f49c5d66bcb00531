"""Adam that keeps the atoms of an SAE on norm 1 within its step, where Triton's kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mmsae.kernels.choice import backend_for
from mmsae.sae import SAE, Dictionary

_HEARD = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)  # of every optimiser


class AtomAdam(torch.optim.Adam):
    """``torch.optim.Adam``, but that one kernel steps a table of atoms: tangent gradient, Adam, renormalisation.

    Each row is read and written once instead of once for each of the three. State is that of ``torch.optim.Adam``, so
    either goes on with the other's; only the number of a table's step stays on the host, for which no step waits.
    Gradients are left as they were.

    Args:
        adam: Whose groups of parameters it takes over.
        atoms: Dictionaries with ``norm`` ``unit``, whose weights are among the parameters.
        tangent: Whether gradients of atoms are made tangent here too; else they are already.
    """

    def __init__(self, adam: torch.optim.Adam, atoms: list[Dictionary], tangent: bool) -> None:
        super().__init__(adam.param_groups)
        self.atoms, self.tangent = atoms, tangent
        self._steps: dict[Tensor, int] = {}  # of every table, as they are in its state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = {d.weight: d.weight.grad for d in self.atoms}
        for dictionary in self.atoms:
            if dictionary.weight.grad is None:
                dictionary.project_()
        for group in self.param_groups:
            for weight in group["params"]:
                if grads.get(weight) is not None:
                    self._step_rows(weight, group)
                    weight.grad = None  # what steps the others leaves it out
        if not self._step_others():
            super().step()
        for weight, grad in grads.items():
            weight.grad = grad
        return loss

    step.hooked = True  # torch would call the hooks of a step here once more, and super() does

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; torch's own way takes longer than that of an SAE's forward pass should."""
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    def _step_others(self) -> bool:
        """One call of the fused kernel a group for what is no table of atoms; torch's way there takes as long as ten.

        Nothing is done, and False returned, in the first step, which makes the state, and where torch's own is due.
        """
        heard = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_HEARD)
        if any(heard) or getattr(self, "grad_scale", None) is not None:
            return False
        parts = []
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            states = [self.state.get(w) for w in weights]
            alike = all(w.dtype == w.grad.dtype == torch.float32 and w.device == weights[0].device for w in weights)
            if not (group["fused"] and alike and all(states)) or any(w.grad.is_sparse for w in weights):
                return False
            parts.append((group, weights, states))
        for group, weights, states in parts:
            if weights:
                steps, means, squares = ([s[n] for s in states] for n in ("step", "exp_avg", "exp_avg_sq"))
                (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
                torch._foreach_add_(steps, 1)
                torch._fused_adam_(
                    weights, [w.grad for w in weights], means, squares, [], steps, lr=lr, beta1=beta1, beta2=beta2,
                    weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
                )  # fmt: skip
        return True

    def _step_rows(self, weight: Tensor, group: dict[str, Any]) -> None:
        from mmsae.kernels.triton.optim import adam_rows_

        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            self._steps[weight] = 0
        elif weight not in self._steps:
            self._steps[weight] = int(state["step"])
        state["step"] += 1
        self._steps[weight] += 1
        adam_rows_(
            weight,
            weight.grad.contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            self._steps[weight],
            group["lr"],
            *group["betas"],
            group["eps"],
            self.tangent,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._steps.clear()
        for dictionary in self.atoms:
            if state := self.state.get(dictionary.weight):
                state["step"] = state["step"].cpu()  # of a fused Adam it is on the device


def with_atoms(optimizer: Optimizer, sae: SAE, tangent: bool) -> Optimizer:
    """An optimiser that steps the atoms of an SAE by kernel, where there is one for them; else the same optimiser.

    There is one for a plain ``torch.optim.Adam`` on float32 atoms of norm ``unit``, where Triton is the backend of
    their device.

    Args:
        optimizer: Fresh, of weights of ``sae``, which are where they are trained.
        sae: The SAE.
        tangent: Whether nothing looks at the gradients between their projection and the step, as clipping does.
    """
    if type(optimizer) is not torch.optim.Adam or not all(map(_is_plain, optimizer.param_groups)):
        return optimizer
    stepped = {weight for group in optimizer.param_groups for weight in group["params"]}
    atoms = [d for d in sae.dictionaries.values() if _has_kernel(d) and d.weight in stepped]
    return AtomAdam(optimizer, atoms, tangent) if atoms else optimizer


class InStep(NamedTuple):
    """Dictionaries for which an optimiser's step does what is otherwise done around it."""

    tangent: list[Dictionary]  #: Whose gradients it makes tangent.
    unit: list[Dictionary]  #: Whose atoms it puts back on norm 1.


def kept_by(optimizer: Optimizer | None) -> InStep:
    """What the step of an optimiser does; of others than :class:`AtomAdam` nothing."""
    if not isinstance(optimizer, AtomAdam):
        return InStep([], [])
    return InStep(optimizer.atoms if optimizer.tangent else [], optimizer.atoms)


def _is_plain(group: dict[str, Any]) -> bool:
    numbers = (group["lr"], group["eps"], *group["betas"])
    others = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable")
    return not any(group[name] for name in others) and not any(isinstance(n, Tensor) for n in numbers)


def _has_kernel(d: Dictionary) -> bool:
    return (
        type(d).project_ is Dictionary.project_
        and d.norm == "unit"
        and d.weight.requires_grad
        and d.weight.dtype == torch.float32
        and d.weight.is_contiguous()
        and backend_for(d.weight).name == "triton"
    )

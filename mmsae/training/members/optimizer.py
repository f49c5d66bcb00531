"""What Lightning takes for one optimiser, one schedule and one loss, where every member has its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class MemberOptimizers(Optimizer):
    """Steps the members' optimisers one after the other; its groups of parameters are theirs.

    Args:
        members: ``{name: optimiser}``.
        running: Called for the names of those that are still trained.
    """

    def __init__(self, members: Mapping[str, Optimizer], running: Callable[[], Collection[str]]) -> None:
        super().__init__([group for o in members.values() for group in o.param_groups], {})
        self.members, self.running = dict(members), running

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step those that still run; ``closure`` computes everybody's gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        names = self.running()  # the closure may have stopped one
        for name, optimizer in self.members.items():
            if name in names:
                optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"members": {name: optimizer.state_dict() for name, optimizer in self.members.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, optimizer in self.members.items():
            optimizer.load_state_dict(state_dict["members"][name])
        self.param_groups = [group for o in self.members.values() for group in o.param_groups]

    def put_back(self, name: str, state_dict: Mapping[str, Any]) -> None:
        """Set one member's optimiser back to a state, of which it keeps a copy: that of a file may be a map of it."""
        self.members[name].load_state_dict(copy.deepcopy(state_dict))
        self.param_groups = [group for o in self.members.values() for group in o.param_groups]


class MemberSchedules:
    """Steps the members' schedules together; ``optimizer`` is what Lightning looks for."""

    def __init__(self, members: Mapping[str, Any], optimizer: MemberOptimizers) -> None:
        self.members, self.optimizer = dict(members), optimizer

    def step(self) -> None:
        """Step those of members that still run."""
        for name in self.optimizer.running():
            if name in self.members:
                self.members[name].step()

    def state_dict(self) -> dict[str, Any]:
        """Of every member's schedule."""
        return {"members": {name: schedule.state_dict() for name, schedule in self.members.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set every member's schedule back."""
        for name, schedule in self.members.items():
            schedule.load_state_dict(state_dict["members"][name])

    def put_back(self, name: str, state_dict: Mapping[str, Any]) -> None:
        """Set one member's schedule back to a state."""
        self.members[name].load_state_dict(copy.deepcopy(state_dict))


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are computed already; on the way back they go where the weights wait for theirs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients as they are: what comes back of the sum of losses is the share that they were made with."""
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *gradients


def with_gradients(loss: Tensor, weights: Sequence[nn.Parameter], share: int) -> Tensor:
    """A member's loss without its graph: the gradients are taken at once, so that one member's graph is held at a time.

    They are those of ``loss / share``, as Lightning's are where it accumulates over so many batches, and ordinary ones
    to whatever waits for them: the reduction over ranks, the sum over batches.
    """
    if not loss.requires_grad:
        return loss.detach()
    with torch.autocast(loss.device.type, enabled=False):  # Lightning goes back outside of it, too
        gradients = torch.autograd.grad(loss / share, weights, allow_unused=True)
    return _WithGradients.apply(loss.detach(), list(gradients), *weights)


def without_gradients(weights: Sequence[nn.Parameter]) -> Tensor:
    """A loss of 0 of a member that is trained no longer, for the reduction over ranks, which waits for all weights."""
    zeros = [torch.zeros_like(weight) for weight in weights]
    return _WithGradients.apply(weights[0].new_zeros(()), zeros, *weights)

"""Learning-rate schedules by step, as functions of the share of the training that is done."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmsae.types import InputError


def multiplier(kind: str, step: int, total: int, warmup: float, decay: float, floor: float, epochs: int) -> float:
    """Learning-rate factor at ``step`` of ``total``; arguments as in :class:`Schedule`."""
    if kind == "paper":
        epoch = min(epochs - 1, step * epochs // max(1, total))
        n_warm = round(warmup * epochs)
        if epoch < n_warm:
            return (epoch + 1) / n_warm
        return 0.5 * (1 + math.cos(math.pi * (epoch - n_warm + 1) / (epochs - n_warm)))
    n_warm = warmup * total if warmup < 1 else warmup
    if step < n_warm:
        return (step + 1) / (n_warm + 1)
    if kind == "cosine":
        done = (step - n_warm) / max(1.0, total - n_warm)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    left = (total - step) / max(1.0, decay * total)
    return max(floor, min(1.0, left))


class Schedule(LambdaLR):
    """Warm-up, then constant and linear decay at the end, or a cosine.

    Args:
        optimizer: The optimiser.
        kind: ``linear``: constant after the warm-up, falling linearly over the last ``decay`` of the training;
            ``cosine``: cosine after the warm-up; ``paper``: VL-SAE's, constant within each of ``epochs`` equal parts,
            warm-up over ``warmup`` of them, then a cosine that reaches 0 in the last.
        warmup: Warm-up, as a share of the training (below 1) or in steps (1 and above).
        decay: Share of the training over which ``linear`` falls.
        floor: Smallest factor.
        epochs: Parts of the ``paper`` schedule.
        total_steps: Steps of the training; None takes the trainer's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kind: str = "linear",
        warmup: float = 0.05,
        decay: float = 0.3,
        floor: float = 0.01,
        epochs: int = 10,
        total_steps: int | None = None,
    ):
        if kind not in ("linear", "cosine", "paper"):
            raise InputError(f"schedule kind must be linear, cosine or paper, not {kind!r}")
        self.total_steps = total_steps
        self.options = {"kind": kind, "warmup": warmup, "decay": decay, "floor": floor, "epochs": epochs}
        args = (warmup, decay, floor, epochs)
        super().__init__(optimizer, lambda step: multiplier(kind, step, self.total_steps or 1, *args))

    def set_total_steps(self, total: int) -> None:
        """Tell how long the training is, where the configuration left it open."""
        if self.total_steps is None:
            self.total_steps = total
            self._set_rates()

    def load_state_dict(self, state: dict) -> None:
        """Go on at the saved step. The length of the training is this run's: it may go on for longer than it was to."""
        total = self.total_steps
        super().load_state_dict(state)
        if self.total_steps != total:
            self.total_steps = total
            self._set_rates()

    def _set_rates(self) -> None:
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)

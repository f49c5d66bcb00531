"""The training loop of the world's models: Muon and AdamW, one schedule, a state from which a killed run goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmsae.errors import InputError
from mmsae.files import atomic_file, atomic_folder, check_writable, disk_errors
from mmsae.world.models.options import Training


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """``(m, n)`` matrix with the singular vectors of ``g`` and singular values near 1 (.7 to 1.2).

    Five quintic Newton-Schulz steps, coefficients of Jordan et al., github.com/KellerJordan/Muon.
    """
    x = g if g.shape[0] <= g.shape[1] else g.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Optimiser of matrices and convolution kernels (flattened to out x rest); embeddings and vectors are AdamW's.

    The update has the root mean square of an Adam step (Moonlight's .2 sqrt(max(m, n)), arXiv 2502.16982), so learning
    rates and (decoupled) weight decay are on Adam's scale; the momentum is Nesterov's. On the generated world the
    zero-shot accuracy of shape, the attribute that is learned last, is .99 after 300 steps of batch 256; with AdamW
    alone it was .64 after 400 and .85 after 800.
    """

    def __init__(self, params: Any, lr: float = 0.03, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(m, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def optimizers(
    named: Iterable[tuple[str, nn.Parameter]], tables: Sequence[str], r: Training
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels, AdamW for vectors and embedding tables, whose names contain one of ``tables``."""
    named = list(named)
    is_table = [any(t in n for t in tables) for n, _ in named]
    matrices = [p for (_, p), table in zip(named, is_table, strict=True) if p.ndim >= 2 and not table]
    looked_up = [p for (_, p), table in zip(named, is_table, strict=True) if p.ndim >= 2 and table]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [{"params": looked_up, "weight_decay": r.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=r.lr, weight_decay=r.weight_decay),
        torch.optim.AdamW(groups, lr=r.adam_lr, betas=(0.9, 0.98), fused=True),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 50 steps or a tenth, cosine down to .02."""
    warm = max(1, min(50, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class RunState(NamedTuple):
    """Where a run keeps what it needs to go on after it was killed."""

    #: If it is there and its identity is equal, training goes on from it to the same result, bit for bit on one CPU,
    #: as without the interruption; a state of another run is said and left unused
    file: Path
    identity: dict[str, Any]  #: What must be equal for that: data, model and recipe
    every: int  #: Number of steps between two writes; 0: never

    def load(self, model: nn.Module, opts: Sequence[torch.optim.Optimizer]) -> tuple[int, list[list[float]]]:
        """The step to go on from (0 without a state of the same run) and the loss curve until there."""
        if not self.file.exists():
            return 0, []
        state = torch.load(self.file, map_location=next(model.parameters()).device, weights_only=True)
        if state["identity"] != json.dumps(self.identity, sort_keys=True):
            return 0, []
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["optimizers"], strict=True):
            o.load_state_dict(s)
        return state["step"], state["curve"]

    def save(self, model: nn.Module, opts: Sequence[torch.optim.Optimizer], step: int, curve: list) -> None:
        """Write the file, whole or not at all."""
        state = {"identity": json.dumps(self.identity, sort_keys=True), "step": step, "curve": curve}
        state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
        with atomic_file(self.file) as temp:
            torch.save(state, temp)


def train(
    model: nn.Module,
    opts: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[int], Tensor],
    r: Training,
    what: str,
    *,
    params: Sequence[nn.Parameter] | None = None,
    max_norm: float = 1.0,
    after: Callable[[int], None] | None = None,
    smooth: float = 0.05,
    state: RunState | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train ``model`` in place.

    Args:
        model: The model, in training mode.
        opts: The optimisers, with their peak learning rates.
        loss_of: Gives the loss of a step, whose batch is a function of seed and step.
        r: The recipe.
        what: What is trained, for the bar.
        params: Parameters whose common gradient is cut; default: all of the model's.
        max_norm: Largest norm of that gradient.
        after: Called after every update, with the number of the step.
        smooth: Weight of a step in the running mean of the loss.
        state: File of the state and how often it is written; without it a killed run starts anew.
        progress: Show a bar with loss and time left.

    Returns:
        ``{"loss": running mean, "curve": [[step, loss], ...]}``, and ``first_step``, where it started, with a state.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    params = list(model.parameters()) if params is None else params
    peaks = [g["lr"] for o in opts for g in o.param_groups]
    first, curve = (0, []) if state is None else state.load(model, opts)
    groups = [g for o in opts for g in o.param_groups]  # loading makes new ones
    if progress and state is not None and state.file.exists():
        print(f"going on from step {first} of {state.file}" if first else f"{state.file} is of another run: not used")
    mean = curve[-1][1] if curve else math.nan
    bar = tqdm(range(first, r.steps), initial=first, total=r.steps, desc=f"training {what}", disable=not progress)
    for step in bar:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, r.steps)
        loss = loss_of(step)
        for o in opts:
            o.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, max_norm)
        for o in opts:
            o.step()
        if after is not None:
            after(step)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}: lower the learning rate (now {r.lr:g})")
        mean = value if math.isnan(mean) else (1 - smooth) * mean + smooth * value
        done = step + 1
        if done % 20 == 0 or done == r.steps:
            curve.append([done, mean])
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if state is not None and state.every and done % state.every == 0 and done < r.steps:
            state.save(model, opts, done, curve)
    model.eval()
    return {"loss": mean, "curve": curve} | ({} if state is None else {"first_step": first})


def free_folder(out: str, overwrite: bool) -> Path:
    """The folder to write a model to.

    Raises:
        InputError: It is in use, or cannot be written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise InputError(f"{out} exists and is not empty: name another folder, or overwrite it with --overwrite true")
    check_writable(target)
    return target


@contextmanager
def cpu_threads(n: int | None) -> Iterator[None]:
    """Compute with so many threads within; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Seconds so far by the clock on the wall (``wall``) and of this process (``cpu``)."""
        return {"wall": time.perf_counter() - self.start[0], "cpu": time.process_time() - self.start[1]}


def finish(
    target: Path, save: Callable[[Path], None], r: Training, found: dict[str, Any], clock: Clock, progress: bool = True
) -> dict[str, Any]:
    """Write a model with its ``training.json``, whole or not at all, and say so.

    ``save`` writes the model into a folder, ``found`` is what :func:`train` returned, and sizes. Returns what was done,
    without the curve of the loss.
    """
    stats = {"out": str(target), "steps": r.steps, **found, "recipe": vars(r), "seconds": clock.seconds()}
    with disk_errors(target), atomic_folder(target) as folder:
        save(folder)
        (folder / "training.json").write_text(json.dumps(stats, indent=1))
    if progress:
        print(f"{r.steps} steps, loss {found['loss']:.3f}, {stats['seconds']['wall']:.0f} s; wrote {target}")
    return {k: v for k, v in stats.items() if k != "curve"}

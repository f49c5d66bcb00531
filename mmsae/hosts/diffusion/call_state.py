"""What is going on inside a diffusion pipeline's own call: branch, prompt, step and grid of every row.

A :class:`CallState` lasts for one call. While prompts are encoded it says which branch they belong to; while the
denoiser is called, a pre-hook fills in what the call's arguments say. Nothing is told by the order of calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.hosts.hooks import Done
from mmsae.hosts.sites import COND, UNCOND
from mmsae.types import InputError


class CallState:
    """One call of a pipeline, or one encoding of prompts.

    Attributes:
        items: ``(n,)`` index of the prompt behind each image of the call.
        last: After this step the call is broken off (:class:`~mmsae.hosts.hooks.Done`); None: never.
        branch: Branch of the prompts that are being encoded; None otherwise.
        branches: One branch per block of ``n`` rows of the denoiser's batch, ``[UNCOND, COND]`` with guidance.
        step: Id of the step under way, from 0; None before the first.
        n_steps: Steps of the schedule; None before the first.
        active: Edits with a window of steps that hold in the encoding under way; None: all of them.
        contexts: ``{edits that hold: what was encoded with them}``, where some have a window of steps.
        windows: ``{edit: (start, end)}`` of those.
        negative: The embeddings of the negative prompts that the pipeline was given, if any.
    """

    def __init__(self, items: Tensor, last: int | None = None):
        self.items, self.last = items, last
        self.branch: int | None = None
        self.branches: tuple[int, ...] = ()
        self.step: int | None = None
        self.n_steps: int | None = None
        self.active: frozenset | None = None
        self.contexts: dict[frozenset, dict[str, Tensor | None]] = {}
        self.windows: dict[Any, tuple[int, int]] = {}
        self.negative: Tensor | None = None
        self._grids: list[tuple[int, int]] = []
        self._times: list[float] = []
        self._at, self._stepped = 0, False

    @contextmanager
    def encoding(self, branch: int, active: frozenset | None = None) -> Iterator[None]:
        """While open, what text encoders are called with are prompts of ``branch``."""
        before = self.branch, self.active
        self.branch, self.active = branch, active
        try:
            yield
        finally:
            self.branch, self.active = before

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Height and width of a sequence of image tokens, from the sizes that the denoiser goes through."""
        return next((g for g in self._grids if g[0] * g[1] == tokens), None)

    def rows(self, batch: int) -> tuple[Tensor, Tensor]:
        """``(batch,)`` prompt and branch of the rows of the denoiser's batch."""
        n = len(self.items)
        if batch != n * len(self.branches):
            raise InputError(f"a site holds {batch} rows, but the denoiser's batch has {n * len(self.branches)}.")
        return self.items.repeat(len(self.branches)), torch.tensor(self.branches).repeat_interleave(n)

    # The clock.

    def once(self, denoiser: nn.Module, sample: Tensor) -> None:
        """Say that the denoiser is called by itself, for prompts alone: at step 0 of one."""
        self.branches, self.step, self.n_steps = (COND,), 0, 1
        self._grids = _grids(denoiser, sample, {})

    def enter(self, pipeline: Any, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        """Read the arguments of a call of the denoiser."""
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self._tick(pipeline.scheduler, float(torch.as_tensor(t).flatten()[0]))
        if self.last is not None and self.step > self.last:
            raise Done
        sample = kwargs.get("hidden_states", kwargs.get("sample"))
        sample = args[0] if sample is None else sample
        self.branches = self._split(pipeline, len(sample), kwargs.get("encoder_hidden_states"))
        if not self._grids:
            self._grids = _grids(denoiser, sample, kwargs)

    def _tick(self, scheduler: Any, t: float) -> None:
        first = not self._times
        if first:
            self._times = [float(x) for x in scheduler.timesteps]
            self.n_steps = _index_to_step(scheduler, len(self._times) - 1, len(self._times)) + 1
        low = min(self._at + (self._stepped and not first), len(self._times) - 1)
        self._stepped = False
        # Flux hands over t / 1000. Half precision rounds t by up to 0.4 %, so the expected place is tried first
        scales = (1.0, 1000.0)
        near = [abs(self._times[low] - s * t) <= 8e-3 * abs(self._times[low]) + 1e-3 for s in scales]
        if not any(near):
            far = [min(abs(x - s * t) for s in scales) for x in self._times]
            low = min(range(len(far)), key=lambda i: (far[i], i < low, i))
        self._at = low
        self.step = _index_to_step(scheduler, low, len(self._times))

    def _split(self, pipeline: Any, batch: int, context: Tensor | None) -> tuple[int, ...]:
        n = len(self.items)
        if batch == n:  # no guidance, or one call per branch (Flux)
            return (UNCOND if context is not None and context is self.negative else COND,)
        if batch == 2 * n and getattr(pipeline, "do_classifier_free_guidance", False):
            return UNCOND, COND
        raise InputError(
            f"{type(pipeline).__name__} calls its denoiser with {batch} rows for {n} images: guidance with other "
            "branches than negative and positive prompt is not known here."
        )

    # Contexts that change from step to step.

    def held(self, step: int) -> frozenset:
        """The edits with a window of steps that hold at a step."""
        return frozenset(e for e, (start, end) in self.windows.items() if start <= step < end)

    def choose(self, kwargs: dict) -> dict:
        """The denoiser's arguments with the contexts of this step."""
        if not self.contexts:
            return kwargs
        found = self.contexts[self.held(self.step)]

        def joined(name: str, old: Tensor) -> Tensor:
            names = {COND: name, UNCOND: f"negative_{name}"}
            return torch.cat([found[names[b]] for b in self.branches]).to(old)

        new = {**kwargs, "encoder_hidden_states": joined("prompt_embeds", kwargs["encoder_hidden_states"])}
        added = kwargs.get("added_cond_kwargs") or {}
        if "text_embeds" in added:
            new["added_cond_kwargs"] = {**added, "text_embeds": joined("pooled_prompt_embeds", added["text_embeds"])}
        if kwargs.get("pooled_projections") is not None:
            new["pooled_projections"] = joined("pooled_prompt_embeds", kwargs["pooled_projections"])
        return new


def _index_to_step(scheduler: Any, index: int, total: int) -> int:
    """Step of the evaluation ``index`` of ``total``.

    Schedulers of order 2 evaluate twice per step (the last step once); PNDM repeats the beginning of its schedule,
    which counts as step 0.
    """
    order = getattr(scheduler, "order", 1)
    if order > 1:
        return index // order
    steps = getattr(scheduler, "num_inference_steps", None) or total
    return max(0, index - max(0, total - steps))


def _grids(denoiser: nn.Module, sample: Tensor, kwargs: dict) -> list[tuple[int, int]]:
    """Sizes of the maps inside a denoiser, largest first."""
    ids = kwargs.get("img_ids")
    if sample.ndim == 3:  # packed latents of Flux; ids are (T, 3): 0, row, column
        return [] if ids is None else [tuple(int(i) + 1 for i in ids.reshape(-1, 3)[:, 1:].amax(0))]
    h, w = sample.shape[-2:]
    patch = getattr(denoiser.config, "patch_size", None)
    if isinstance(patch, int):
        return [(h // patch, w // patch)]
    sizes = [(h, w)]
    while sizes[-1] != (1, 1):
        sizes.append(tuple(-(-x // 2) for x in sizes[-1]))
    return sizes


@contextmanager
def clock(pipeline: Any, denoiser: nn.Module, run: CallState) -> Iterator[None]:
    """While open, ``run`` follows the pipeline's call: its steps, branches and contexts."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        run.enter(pipeline, module, args, kwargs)
        return args, run.choose(kwargs)

    step = pipeline.scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        run._stepped = True
        return step(*args, **kwargs)

    scheduler = pipeline.scheduler
    own = scheduler.__dict__.get("step")
    scheduler.__dict__["step"] = counted
    try:
        with denoiser.register_forward_pre_hook(before, with_kwargs=True):
            yield
    finally:
        del scheduler.__dict__["step"]
        if own is not None:
            scheduler.step = own

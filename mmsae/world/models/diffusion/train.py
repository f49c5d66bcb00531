"""The loop that trains a denoiser and its text encoder together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmsae.world.models.contrastive import schedule
from mmsae.world.models.loop import Muon


class DiffusionRecipe(NamedTuple):
    """How to train.

    Attributes:
        steps: Optimiser steps.
        batch_size: Pictures a step.
        seed: Of order, captions, noise and times.
        lr: Peak learning rate of Muon (weight matrices and kernels).
        adam_lr: Peak learning rate of AdamW (embeddings, norms, biases).
        weight_decay: On everything of two or more dimensions.
        p_null: Share of captions replaced by the empty one, for classifier-free guidance (arXiv 2207.12598).
        ema: Decay of the mean over steps that is kept in place of the last weights.
    """

    steps: int
    batch_size: int = 32
    seed: int = 0
    lr: float = 0.02
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    p_null: float = 0.1
    ema: float = 0.99


class Examples(NamedTuple):
    """What is learned from, in memory.

    Attributes:
        latents: ``(N, C, h, w) float32`` scaled latents.
        ids: ``(U + 1, L) int64`` tokens of the different captions, the empty one last.
        captions: ``(N, K) int64`` rows of ``ids``.
        counts: ``(N,) int64`` captions of each picture.
    """

    latents: Tensor
    ids: Tensor
    captions: np.ndarray
    counts: np.ndarray


def optimizers(parts: nn.ModuleList, r: DiffusionRecipe) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels, AdamW for embedding tables and vectors."""
    named = list(parts.named_parameters())
    matrices = [p for n, p in named if p.ndim >= 2 and "_embedding.weight" not in n]
    tables = [p for n, p in named if p.ndim >= 2 and "_embedding.weight" in n]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": r.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=r.lr, weight_decay=r.weight_decay),
        torch.optim.AdamW(groups, lr=r.adam_lr, betas=(0.9, 0.98), fused=True),
    ]


def draw(data: Examples, r: DiffusionRecipe, step: int, n_times: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch ``step`` of the run, a function of seed and step.

    Returns:
        Latents ``(B, C, h, w)``, noise of that shape, times ``(B,)``, tokens ``(B, L)``.
    """
    rng = np.random.default_rng([r.seed, 30, step])
    rows = rng.integers(0, len(data.latents), size=r.batch_size)
    column = (rng.random(r.batch_size) * data.counts[rows]).astype(int)
    text = np.where(rng.random(r.batch_size) < r.p_null, len(data.ids) - 1, data.captions[rows, column])
    # one time from each of B equal strata: less noise in the gradient than independent ones
    times = ((np.arange(r.batch_size) + rng.random(r.batch_size)) / r.batch_size * n_times).astype(np.int64)
    noise = rng.standard_normal((r.batch_size, *data.latents.shape[1:]), dtype=np.float32)
    return data.latents[torch.from_numpy(rows)], torch.from_numpy(noise), torch.from_numpy(times), data.ids[text]


def train(
    unet: nn.Module, text_encoder: nn.Module, scheduler: Any, data: Examples, r: DiffusionRecipe, progress: bool = True
) -> dict[str, Any]:
    """Train ``unet`` and ``text_encoder`` in place; they end as the mean of their weights over the last steps.

    Args:
        unet: ``(x, time, text states) -> .sample``.
        text_encoder: ``(tokens) -> .last_hidden_state``.
        scheduler: Of diffusers, with ``prediction_type`` ``v_prediction``.
        data: What to learn from.
        r: The recipe.
        progress: Say about how long it takes, and show a bar with loss and time left.

    Returns:
        ``{"loss": running mean, "curve": [[step, loss], ...]}``.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    device = next(unet.parameters()).device
    parts = nn.ModuleList([unet, text_encoder]).train()
    opts = optimizers(parts, r)
    groups = [g for o in opts for g in o.param_groups]
    peaks = [g["lr"] for g in groups]
    weights = list(parts.parameters())
    means = [p.detach().clone() for p in weights]
    mean, curve = math.nan, []

    def loss_of(step: int) -> Tensor:
        x, noise, times, ids = (t.to(device) for t in draw(data, r, step, scheduler.config.num_train_timesteps))
        states = text_encoder(input_ids=ids).last_hidden_state
        v = unet(scheduler.add_noise(x, noise, times), times, states).sample
        return nn.functional.mse_loss(v, scheduler.get_velocity(x, noise, times))

    if progress:
        print(f"about {r.steps * _seconds(lambda: loss_of(0).backward()):.0f} s", flush=True)
    bar = tqdm(range(r.steps), desc="training diffusion", disable=not progress)
    for step in bar:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, r.steps)
        loss = loss_of(step)
        for o in opts:
            o.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for o in opts:
            o.step()
        torch._foreach_lerp_(means, [p.detach() for p in weights], 1 - min(r.ema, (1 + step) / (10 + step)))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}: lower the learning rate (now {r.lr:g})")
        mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
        if (step + 1) % 20 == 0 or step + 1 == r.steps:
            curve.append([step + 1, mean])
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
    with torch.no_grad():
        for p, m in zip(weights, means, strict=True):
            p.copy_(m)
    parts.eval()
    return {"loss": mean, "curve": curve}


def _seconds(work: Callable[[], None]) -> float:
    """How long a step takes, from one without an update; the one before it warms up. Updates add a quarter."""
    work()
    start = time.perf_counter()
    work()
    return 1.25 * (time.perf_counter() - start)

"""A denoiser and its text encoder, trained together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmsae.world.models import loop
from mmsae.world.models.options import Training


@dataclass(frozen=True)
class DiffusionTraining(Training):
    """How to train a denoiser."""

    p_null: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance (arXiv 2207.12598)."""
    ema: float = 0.99
    """Decay of the mean over steps that is kept in place of the last weights."""


class Examples(NamedTuple):
    """What is learned from, in memory."""

    latents: Tensor  #: ``(N, C, h, w) float32`` scaled latents
    ids: Tensor  #: ``(U + 1, L) int64`` tokens of the different captions, the empty one last
    captions: np.ndarray  #: ``(N, K) int64`` rows of ``ids``
    counts: np.ndarray  #: ``(N,) int64`` captions of each image


def draw(data: Examples, r: DiffusionTraining, step: int, n_times: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    unet: nn.Module,
    text_encoder: nn.Module,
    scheduler: Any,
    data: Examples,
    r: DiffusionTraining,
    progress: bool = True,
) -> dict[str, Any]:
    """Train ``unet`` and ``text_encoder`` in place; they end as the mean of their weights over the last steps.

    The scheduler is one of diffusers that predicts v. With ``progress`` it says about how long it takes. Returns what
    :func:`mmsae.world.models.loop.train` does.
    """
    device = next(unet.parameters()).device
    parts = nn.ModuleList([unet, text_encoder]).train()
    opts = loop.optimizers(parts.named_parameters(), ("_embedding.weight",), r)
    weights = list(parts.parameters())
    means = [p.detach().clone() for p in weights]

    def loss_of(step: int) -> Tensor:
        x, noise, times, ids = (t.to(device) for t in draw(data, r, step, scheduler.config.num_train_timesteps))
        states = text_encoder(input_ids=ids).last_hidden_state
        v = unet(scheduler.add_noise(x, noise, times), times, states).sample
        return nn.functional.mse_loss(v, scheduler.get_velocity(x, noise, times))

    def average(step: int) -> None:
        torch._foreach_lerp_(means, [p.detach() for p in weights], 1 - min(r.ema, (1 + step) / (10 + step)))

    if progress:
        print(f"about {r.steps * _seconds(lambda: loss_of(0).backward()):.0f} s", flush=True)
    found = loop.train(parts, opts, loss_of, r, "diffusion", after=average, smooth=0.02, progress=progress)
    with torch.no_grad():
        for p, m in zip(weights, means, strict=True):
            p.copy_(m)
    return found


def _seconds(work: Callable[[], None]) -> float:
    """How long a step takes, from one without an update; the one before it warms up. Updates add a quarter."""
    work()
    start = time.perf_counter()
    work()
    return 1.25 * (time.perf_counter() - start)

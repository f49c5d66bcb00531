"""Dead latents start again at rows that are reconstructed badly."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from mmsae.sae import SAE, LossContext
from mmsae.sae.normaliser import all_reduce
from mmsae.types import InputError, Tokens

_SALT = 11


def check_resampling(sae: SAE) -> None:
    """Refuse an SAE whose latents are not rows of an encoder's and of a dictionary's weight, or not all here.

    Raises:
        InputError: It names the part.
    """
    if sae.shard is not None:
        raise InputError(f"dead latents cannot be resampled where {sae.shard.world} ranks share them: take auxk")
    for part in _encoders(sae).values():
        if not isinstance(getattr(part, "weight", None), nn.Parameter):
            raise InputError(f"dead latents cannot be resampled: encoder {part.name!r} has no weight of its own")
    for dictionary in sae.dictionaries.values():
        if dictionary.rows() is not getattr(dictionary, "weight", None):
            raise InputError(f"dead latents cannot be resampled: the atoms of {dictionary.name!r} are not free weights")


def _encoders(sae: SAE) -> dict[str, nn.Module]:
    """``{"shared" or modality: encoder}``."""
    return dict(getattr(sae.encoder, "encoders", None) or {"shared": sae.encoder})


@torch.no_grad()
def draw(sae: SAE, batch: Tokens, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of a batch for n latents, without replacement, with probability in proportion to their squared error.

    Errors of a modality are in units of its variance. Every rank gets what the first drew of its own rows.

    Returns:
        ``(n,)`` the modality's number of each drawn row, -1 where the batch had too few rows with an error, and
        ``{modality: (n, d)}`` normalised rows: a drawn row, its partner where the batch is paired, else zeros.
    """
    was = sae.training
    outputs = sae.eval()(batch)  # in training a selector may count what it sees
    sae.train(was)
    modalities = list(outputs)
    errors = [(o.target - o.recon).square().sum(1) / sae.normaliser.variance(m) for m, o in outputs.items()]
    weights = torch.cat(errors).double().cpu()
    count = min(n, int((weights > 0).sum()))
    chosen = torch.multinomial(weights, count, generator=generator) if count else torch.zeros(0, dtype=torch.long)
    sizes = torch.tensor([len(e) for e in errors])
    starts = sizes.cumsum(0) - sizes
    which = torch.bucketize(chosen, sizes.cumsum(0), right=True)
    at = chosen - starts[which]
    paired = len(modalities) > 1 and batch.paired()
    device = errors[0].device
    source = torch.zeros(n, dtype=torch.long, device=device)
    source[:count] = which.to(device) + 1
    rows: dict[str, Tensor] = {}
    for i, m in enumerate(modalities):
        target = outputs[m].target
        rows[m] = target.new_zeros(n, target.shape[1])
        own = torch.arange(count) if paired else (which == i).nonzero()[:, 0]
        rows[m][own.to(device)] = target[at[own].to(device)]
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if ranks and torch.distributed.get_rank() != 0:
        for t in (source, *rows.values()):
            t.zero_()
    all_reduce(source, *rows.values())
    return source - 1, rows


@torch.no_grad()
def resample_(sae: SAE, optimizer: Optimizer, dead: Tensor, batch: Tokens, scale: float, generator: Any) -> Tensor:
    """Point dead latents at rows of a batch that are reconstructed badly, and forget what the optimiser knew of them.

    The atom becomes the direction of the row without the decoder's bias; the encoder's row the direction that the
    encoder sees, ``scale`` times as long as those of live latents are on average; its biases become 0. A part that all
    modalities share gets the drawn row, a modality's own part its own row of a pair, and is left where there is none.

    Args:
        sae: The SAE in training; :func:`check_resampling` says whether it can be resampled.
        optimizer: Of its weights; moments of the rows become 0.
        dead: ``(d_sae,)`` bool.
        batch: Rows to draw from.
        scale: See above.
        generator: A ``torch.Generator`` on the CPU, the same on all ranks.

    Returns:
        The ids that were resampled: fewer than there are dead where the batch has fewer rows.
    """
    ids = dead.nonzero()[:, 0]
    source, rows = draw(sae, batch, len(ids), generator)
    ids, rows = ids[source >= 0], {m: x[source >= 0] for m, x in rows.items()}
    modality = source[source >= 0]

    def fill(
        weight: nn.Parameter, vectors: list[nn.Parameter], key: str, centred: bool, length: float | Tensor
    ) -> None:
        for i, (m, x) in enumerate(rows.items()):
            own = (modality == i) if key == "shared" else (x != 0).any(1)
            if key not in ("shared", m) or not own.any():
                continue
            at, bias = ids[own], sae.dictionary(m).bias
            x = x[own] if bias is None or not centred else x[own] - bias
            weight.index_copy_(0, at, F.normalize(x) * length)
            for p in vectors:
                p.index_fill_(0, at, 0.0)
            for p in (weight, *vectors):
                for moment in optimizer.state.get(p, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == p.shape:
                        moment.index_fill_(0, at, 0.0)

    live = ~dead if (~dead).any() else dead
    for key, encoder in _encoders(sae).items():
        vectors = [p for p in encoder.parameters() if p is not encoder.weight]
        length = scale * encoder.weight[live].norm(dim=1).mean()
        fill(encoder.weight, vectors, key, getattr(encoder, "subtract_decoder_bias", False), length)
    for key, dictionary in sae.dictionaries.items():
        fill(dictionary.weight, [], key, True, 1.0)
    return ids


class ResampleDead(Callback):
    """Every so many steps, dead latents start again at rows that are reconstructed badly (Bricken et al. 2023).

    For objectives without AuxK: ReLU + L1, JumpReLU, Gated. Dead are those that did not fire for the module's
    ``dead_after`` tokens; they count as alive again afterwards. What is drawn depends on the seed, the step and the
    batch alone, so a resumed run draws the same.

    Args:
        every: Steps between resamplings.
        scale: Length of a new encoder row, in units of the mean of the live ones.
        until: Share of the training after which there is none, so that new latents have time to settle.
    """

    each_member = True

    def __init__(self, every: int = 2500, scale: float = 0.2, until: float = 0.8) -> None:
        if every < 1 or scale <= 0 or not 0 <= until <= 1:
            raise InputError(f"every and scale must be above 0 and until a share, not {every}, {scale} and {until}")
        self.every, self.scale, self.until = every, scale, until
        self.step = self.resampled = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "resampled": self.resampled}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.resampled = state["step"], state["resampled"]

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        check_resampling(module.sae)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Tokens, batch_idx: int
    ) -> None:
        """Resample after the last batch of a step, where it is time."""
        step = trainer.global_step
        if step == self.step or step % self.every or step > self.until * module.total_steps:
            return
        self.step = step
        dead = module.usage.dead(module.dead_after)
        if not dead.any():
            return
        generator = LossContext(module.sae, step=step, seed=module.seed or 0).generator(_SALT)
        ids = resample_(module.sae, trainer.optimizers[0], dead, batch, self.scale, generator)
        module.usage.since[:, ids] = 0
        self.resampled += len(ids)
        rank_zero_info(f"step {step:,}: {len(ids)} of {int(dead.sum())} dead latents resampled")

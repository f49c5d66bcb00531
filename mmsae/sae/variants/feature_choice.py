"""Feature Choice (arXiv 2411.02124): every latent takes its best rows of a batch, by a quota; and its auxiliary loss.

Of that paper Mutual Choice is :class:`mmsae.sae.BatchTopK`. [R] Its formulas of quotas and of dying features were not
available: those here follow its description.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.sae.losses import AuxK, LossContext, Outputs
from mmsae.sae.normaliser import all_reduce
from mmsae.sae.usage import DEAD_AFTER, fired_counts
from mmsae.sae.variants.batch_topk import BatchTopK
from mmsae.types import InputError


def capped_zipf(n: int, total: float | Tensor, most: float, exponent: float, offset: float) -> Tensor:
    """``(n,)`` float64 shares of ``total`` in proportion to ``(rank + offset)^-exponent``, rank from 0.

    None is above ``most``: what that takes from the first ranks goes to the others in the same proportion. ``total`` is
    at most n * most.
    """
    rank = torch.arange(n, dtype=torch.float64, device=total.device if isinstance(total, Tensor) else None)
    weight = (rank + offset) ** -exponent
    # if the first j ranks are at the cap, the others have this much for every unit of their weight
    rate = (total - most * rank) / weight.flip(0).cumsum(0).flip(0)
    capped = int((rate * weight <= most * (1 + 1e-12)).to(torch.uint8).argmax())
    return torch.where(rank < capped, most, rate[capped] * weight)


def quotas(n: int, total: int, most: int, exponent: float, offset: float) -> Tensor:
    """``(n,)`` int64 quotas by rank, each from 1 to ``most``, whose sum is ``total``; rounded by largest remainder."""
    share = 1 + capped_zipf(n, total - n, most - 1, exponent, offset)
    whole = (share + 1e-9).floor().long()  # a share that is whole but for rounding
    rest = total - int(whole.sum())
    whole[(share - whole).argsort(descending=True, stable=True)[:rest]] += 1
    return whole


class FeatureChoice(BatchTopK):
    """For every latent, the rows of a training batch that answer most to it; entries above its threshold, after it.

    Quotas sum to ``int(k * N)`` over N rows, are at least 1 and at most N, and follow Zipf's law in the latents' rank
    [R]. Latents are ranked by a running mean of their positive scores over all rows, not by what a quota let through:
    that could never exceed the quota. So no latent dies for want of being chosen, while a row may have no latent at all
    (it reconstructs as the decoder's bias). Rows of a batch compete: shuffle them. Each modality has its own ranks,
    quotas and thresholds, one for each latent [R], with which codes of evaluation are JumpReLU's.

    Args:
        k: Mean number of latents of a row.
        exponent: Of Zipf's law; 0: equal quotas.
        offset: Added to the rank, which counts from 0; above 0.
        every: Steps after which latents are ranked anew; the first time after the first step.
        decay: Of the running thresholds and of the running means, for every step.
        score: What is ranked; see :class:`mmsae.sae.Ranked`.
    """

    name = "feature_choice"

    def __init__(
        self,
        k: float = 32,
        exponent: float = 1.0,
        offset: float = 1.0,
        every: int = 200,
        decay: float = 0.99,
        score: str = "value",
    ) -> None:
        super().__init__(k, decay, score)
        if exponent < 0 or offset <= 0 or every < 1:
            raise InputError(
                f"exponent must be at least 0, offset above 0, every at least 1, not {exponent}, {offset} and {every}"
            )
        self.exponent, self.offset, self.every = exponent, offset, every
        self._cached: tuple[tuple[int, float], Tensor] | None = None

    def config(self) -> dict[str, Any]:
        return {**super().config(), "exponent": self.exponent, "offset": self.offset, "every": self.every}

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Check k; allocate thresholds, running means and ranks, each ``(modalities, d_sae)``."""
        super().build(d_sae, modalities)
        self._allocate(modalities, d_sae)
        self.register_buffer("mass", torch.zeros(len(modalities), d_sae))
        self.register_buffer("rank", torch.arange(d_sae).repeat(len(modalities), 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def cut_(self) -> None:
        self.rank.copy_(self.rank.argsort(dim=1).argsort(dim=1))  # among those that are left

    def quotas(self, n: int) -> Tensor:
        """``(d_sae,)`` quotas by rank in a batch of n rows, on the CPU.

        Raises:
            InputError: The batch is too small for one row for every latent.
        """
        key = (n, self._k)
        if self._cached is None or self._cached[0] != key:
            total, d_sae = int(self._k * n), self.rank.shape[1]
            if total < d_sae:
                raise InputError(
                    f"a batch of {n} rows has {total} entries to give at k = {self._k:g}, fewer than the {d_sae} "
                    f"latents, each of which takes at least 1: give at least {-(-d_sae // self._k):.0f} rows"
                )
            self._cached = key, quotas(d_sae, total, n, self.exponent, self.offset)
        return self._cached[1]

    def _mask(self, scores: Tensor, modality: str) -> Tensor:
        i, by_rank = self.modalities.index(modality), self.quotas(len(scores))
        mass, n = scores.relu().sum(0).to(self.mass.dtype), self.steps.new_tensor(len(scores))
        all_reduce(mass, n)
        self.mass[i] = self.decay * self.mass[i] + (1 - self.decay) * mass / n
        best = scores.topk(int(by_rank.max()), dim=0).indices
        place = torch.arange(len(best), device=best.device)[:, None]
        within = place < by_rank.to(best.device)[self.rank[i]]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best, within)

    def _least(self, kept: Tensor) -> Tensor:
        return kept.amin(0)

    @torch.no_grad()
    def after_step_(self) -> None:
        """Rank the latents anew, every so many steps; nothing waits for the device."""
        self.steps += 1
        due = self.steps % self.every == 1 % self.every
        rank = self.mass.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        self.rank.copy_(torch.where(due, rank, self.rank))


class AuxZipf(AuxK):
    """AuxK for *dying* latents, which fire less often than a share of what Zipf's law expects at their rank [R].

    A latent's frequency is an exponential mean over about ``dead_after`` rows, the largest of its modalities; nothing
    is trained before so many rows of all were seen. The law's sum is the mean L0, and no expectation is above 1.

    Args:
        coefficient: Weight of the term.
        k_aux: Dying latents used a row (default: d_in / 2, at most the number of dying ones).
        dead_after: Rows over which frequencies are taken; default as AuxK's.
        share: Share of its expected frequency below which a latent is dying.
        exponent: Of Zipf's law.
        offset: Added to the rank, which counts from 0.
    """

    name = "aux_zipf"

    def __init__(
        self,
        coefficient: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int | None = None,
        share: float = 0.5,
        exponent: float = 1.0,
        offset: float = 1.0,
    ) -> None:
        super().__init__(coefficient, k_aux, dead_after)
        if not 0 < share <= 1 or exponent < 0 or offset <= 0:
            raise InputError(
                f"share must lie in (0, 1], exponent be at least 0, offset above 0, not {share}, {exponent}, {offset}"
            )
        self.share, self.exponent, self.offset = share, exponent, offset

    def build(self, sae: Any) -> None:
        """Allocate the running frequencies, ``(modalities, d_sae)``, and how much of them is known."""
        self.register_buffer(
            "frequency", torch.zeros(len(sae.modalities), sae.d_sae, device=next(sae.buffers()).device)
        )
        self.register_buffer("known", self.frequency.new_zeros(len(sae.modalities)))

    @torch.no_grad()
    def members(self, outputs: Outputs, ctx: LossContext) -> Tensor | None:
        """``(n,)`` ids of the dying latents; None before enough rows were seen. It counts the outputs' codes."""
        if "frequency" not in self._buffers:  # in a loop without LitSAE
            self.build(ctx.sae)
        window = self.dead_after or DEAD_AFTER
        for m, out in outputs.items():
            i, fired = ctx.sae.modalities.index(m), fired_counts(out.codes)
            n = fired.new_tensor(out.codes.n)
            all_reduce(fired, n)
            decay = torch.exp(-n / window)
            self.frequency[i] = decay * self.frequency[i] + (1 - decay) * fired / n
            self.known[i] = decay * self.known[i] + (1 - decay)
        if not bool((self.known >= 1 - 1.001 / torch.e).all()):  # one window
            return None
        frequency, order = (self.frequency / self.known[:, None]).amax(0).sort(descending=True, stable=True)
        expected = capped_zipf(len(order), frequency.double().sum(), 1.0, self.exponent, self.offset)
        return order[frequency < self.share * expected].sort().values

"""Which latents fire: the single source for AuxK, reports and anything that acts on dead or dying latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmsae.device import Ahead, waits
from mmsae.sae.normaliser import all_reduce
from mmsae.types import Codes

DEAD_AFTER = 1_000_000  # tokens without firing after which a latent counts as dead, where nothing else is said


def fired_counts(codes: Codes, out: Tensor | None = None) -> Tensor:
    """``(d_sae,)`` int64: in how many rows each latent fired (value not 0, whatever its sign); added to ``out``."""
    fired = (codes.values != 0).long()
    if out is None:
        out = torch.zeros(codes.d_sae, dtype=torch.long, device=fired.device)
    if codes.indices is None:
        return out.add_(fired.sum(0))
    return out.scatter_add_(0, codes.indices.reshape(-1), fired.reshape(-1))


class UsageTracker(nn.Module):
    """Tokens since each latent fired, and fire counts, per modality; summed over ranks; all counts in tokens.

    Args:
        d_sae: Latents that are counted.
        modalities: Names of the modalities.
        apart: Whether ranks have other latents, of the same rows: then nothing is summed.
    """

    def __init__(self, d_sae: int, modalities: Sequence[str], apart: bool = False):
        super().__init__()
        self.modalities, self.apart = tuple(modalities), apart
        each = torch.zeros(len(modalities), d_sae, dtype=torch.long)
        self.register_buffer("since", each)  # tokens of the modality since the latent last fired on it
        self.register_buffer("counts", each.clone())  # rows on which the latent fired since reset()
        self.register_buffer("tokens", torch.zeros(len(modalities), dtype=torch.long))  # rows seen since reset()
        self._bound: int | None = None  # that dead_ids was asked for
        self._ahead: Ahead | None = None
        self._sent: tuple[int, int] | None = None  # bound and version of ``since`` that the number on its way is of

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_ahead": None, "_sent": None}  # events are not copied

    @torch.no_grad()
    def update(self, codes: Mapping[str, Codes]) -> None:
        """Count one step's codes of ``{modality: Codes}``; every rank must call it with the same modalities."""
        d_sae = self.since.shape[1]
        found = self.since.new_zeros(len(codes), d_sae + 1)  # the last column: rows seen
        for row, c in zip(found, codes.values(), strict=True):
            fired_counts(c, row[:d_sae])
            row[d_sae:].fill_(c.n)  # by item it could be a copy from the host
        if not self.apart:
            all_reduce(found)
        fired, seen = found[:, :d_sae], found[:, d_sae:]
        if tuple(codes) == self.modalities:
            self._add(slice(None), fired, seen)
        else:
            for i, m in enumerate(codes):
                self._add(self.modalities.index(m), fired[i], seen[i])
        if self._bound is not None and waits(self.since):
            self._send(self._bound)

    def _add(self, at: int | slice, fired: Tensor, seen: Tensor) -> None:
        self.since[at].add_(seen).masked_fill_(fired > 0, 0)
        self.counts[at].add_(fired)
        self.tokens[at].add_(seen.squeeze(-1))

    def _send(self, bound: int) -> None:
        if self._ahead is None:
            self._ahead = Ahead(self.since.device)
        self._ahead.send(self.dead(bound).sum())
        self._sent = (bound, self.since._version)

    def dead_ids(self, tokens: int) -> Tensor:
        """``(n,)`` ids of the latents that :meth:`dead` finds, ascending.

        On a device their number is sent to the host after every :meth:`update`, from the second call on, so that a
        step waits for the end of the last one's counting and not for all that the device has to do.
        """
        if not waits(self.since):
            return self.dead(tokens).nonzero()[:, 0]
        self._bound = tokens
        if self._sent != (tokens, self.since._version):  # the first time, or somebody else changed the counts
            self._send(tokens)
        n = self._ahead.get()
        if n == 0:
            return torch.empty(0, dtype=torch.long, device=self.since.device)
        return self.dead(tokens).byte().argsort(descending=True, stable=True)[:n]

    def reset(self) -> None:
        """Start new counts (tokens since fired go on)."""
        self.counts.zero_()
        self.tokens.zero_()

    def known(self, tokens: int) -> bool:
        """Whether enough rows were seen of every modality that a latent could count as dead after ``tokens``."""
        return bool((self.tokens >= tokens).all())

    def dead(self, tokens: int, modality: str | None = None) -> Tensor:
        """``(d_sae,)`` bool: not fired for ``tokens`` rows on a modality, or (None) on any modality."""
        since = self.since.min(0).values if modality is None else self.since[self.modalities.index(modality)]
        return since >= tokens

    def density(self, modality: str) -> Tensor:
        """``(d_sae,)`` share of a modality's rows on which each latent fired since :meth:`reset`."""
        row = self.modalities.index(modality)
        return self.counts[row] / self.tokens[row].clamp(min=1)

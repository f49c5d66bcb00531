"""Activations whose dictionary and codes are known, made on the fly, for tests and sanity checks of new SAEs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mmsae.types import Codes, InputError, Tokens


class SyntheticPairs:
    """Items that are sparse sums of atoms, seen in one or several modalities.

    An item has ``k`` active atoms with weights 0.5 to 1.5. Every modality sees the same atoms and weights through its
    own dictionary, plus its own mean (the modality gap) and noise: ``x = weights @ atoms[m] + mean[m] + noise``.

    Args:
        d_in: Width.
        n_atoms: Atoms of the true dictionary.
        k: Active atoms per item.
        modalities: Names of the modalities.
        noise: Standard deviation of the noise, per feature, times sqrt(d_in): its expected norm.
        modality_gap: Norm of each modality's mean.
        atom_cosine: Cosine (in expectation) of an atom of one modality with the same atom of another.
        seed: Seed of dictionary and means; items are drawn from the generator of :meth:`sample`.

    Attributes:
        atoms: ``{modality: (n_atoms, d_in)}``, unit norm.
        mean: ``{modality: (d_in,)}``.
    """

    def __init__(
        self,
        d_in: int = 64,
        n_atoms: int = 128,
        k: int = 4,
        modalities: Sequence[str] = ("image", "text"),
        noise: float = 0.05,
        modality_gap: float = 1.0,
        atom_cosine: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 1 <= k <= n_atoms:
            raise InputError(f"k is {k}, it must be between 1 and the number of atoms, {n_atoms}")
        if not 0 <= atom_cosine <= 1:
            raise InputError(f"atom_cosine is {atom_cosine:g}, it must be between 0 and 1")
        self.d_in, self.n_atoms, self.k, self.noise = d_in, n_atoms, k, noise
        g = torch.Generator().manual_seed(seed)
        common = F.normalize(torch.randn(n_atoms, d_in, generator=g), dim=1)
        self.atoms, self.mean = {}, {}
        for m in modalities:
            own = F.normalize(torch.randn(n_atoms, d_in, generator=g), dim=1)
            # independent directions are nearly orthogonal, so that two modalities share a cosine of a * a
            self.atoms[m] = F.normalize(atom_cosine**0.5 * common + (1 - atom_cosine) ** 0.5 * own, dim=1)
            self.mean[m] = modality_gap * F.normalize(torch.randn(d_in, generator=g), dim=0)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tokens, dict[str, Codes]]:
        """``n`` items and their true codes, per modality (equal ones, with another modality name)."""
        indices = torch.rand(n, self.n_atoms, generator=generator).topk(self.k).indices
        values = 0.5 + torch.rand(n, self.k, generator=generator)
        codes = {m: Codes(values, indices, self.n_atoms, m) for m in self.atoms}
        x = {}
        for m, atoms in self.atoms.items():
            noise = torch.randn(n, self.d_in, generator=generator) * (self.noise / self.d_in**0.5)
            x[m] = codes[m].decode_with(atoms) + self.mean[m] + noise
        return Tokens.pooled(x), codes


class SyntheticLoader:
    """Batches of :class:`SyntheticPairs`: batch i of an epoch derives from (seed, epoch, i, rank) alone.

    Every epoch draws new items where they are ``fresh`` (training), else the same ones (validation).
    """

    def __init__(
        self, pairs: SyntheticPairs, batch_size: int, n_batches: int, seed: int = 0, rank: int = 0, fresh: bool = True
    ) -> None:
        self.pairs, self.batch_size, self.n_batches = pairs, batch_size, n_batches
        self.seed, self.rank, self.fresh = seed, rank, fresh
        self.epoch, self.batch, self._begun = 0, 0, False

    def __len__(self) -> int:
        return self.n_batches

    def make(self, epoch: int, batch: int) -> tuple[Tokens, dict[str, Codes]]:
        """One batch and its true codes."""
        words = np.random.SeedSequence([self.seed, epoch if self.fresh else 0, batch, self.rank]).generate_state(2)
        g = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        return self.pairs.sample(self.batch_size, g)

    def __iter__(self) -> Iterator[Tokens]:
        if self._begun or self.batch >= self.n_batches:
            self.epoch, self.batch = self.epoch + 1, 0
        self._begun = False
        return self._run(self.epoch, self.batch)

    def _run(self, epoch: int, first: int) -> Iterator[Tokens]:
        for b in range(first, self.n_batches):
            self.batch, self._begun = b + 1, True
            yield self.make(epoch, b)[0]

    def state_dict(self) -> dict[str, Any]:
        """The place in the sequence."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at that place at the next ``iter()``."""
        self.epoch, self.batch, self._begun = state["epoch"], state["batch"], False

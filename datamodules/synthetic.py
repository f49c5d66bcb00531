"""Activations with a known dictionary, as a LightningDataModule."""

from __future__ import annotations

import lightning

from datamodules.options import ranks_of
from mmsae.activations import SyntheticLoader, SyntheticPairs
from mmsae.types import Site


class SyntheticDictionary(lightning.LightningDataModule):
    """Sparse sums of known atoms, paired over modalities; for sanity checks, sweeps and tests without data.

    Args:
        d_in: Width.
        n_atoms: Atoms of the true dictionary.
        k: Active atoms per item.
        modalities: Names of the modalities.
        noise: Expected norm of the noise.
        modality_gap: Norm of each modality's mean.
        atom_cosine: Cosine of an atom of one modality with the same atom of another.
        pairs: Items per training epoch, over all ranks.
        val_pairs: Validation items, over all ranks.
        batch_size: Items per batch and rank.
        seed: Seed of dictionary and items.

    Attributes:
        truth: The generator, with ``atoms`` and ``mean`` per modality.
    """

    def __init__(
        self,
        d_in: int = 64,
        n_atoms: int = 128,
        k: int = 4,
        modalities: list[str] = ["image", "text"],  # noqa: B006 - never changed; shown by --help
        noise: float = 0.05,
        modality_gap: float = 1.0,
        atom_cosine: float = 1.0,
        pairs: int = 65536,
        val_pairs: int = 4096,
        batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.d_in, self.modalities = d_in, tuple(modalities)
        self.truth = SyntheticPairs(d_in, n_atoms, k, modalities, noise, modality_gap, atom_cosine, seed)
        self.pairs, self.val_pairs, self.batch_size, self.seed = pairs, val_pairs, batch_size, seed

    @property
    def sites(self) -> dict[str, Site]:
        """None: no host made these."""
        return {}

    def train_dataloader(self) -> SyntheticLoader:
        """New items in every epoch; can be resumed in the middle of one."""
        return self._loader(self.pairs, seed=2 * self.seed, fresh=True)

    def val_dataloader(self) -> SyntheticLoader:
        """The same items every time, none of them in training."""
        return self._loader(self.val_pairs, seed=2 * self.seed + 1, fresh=False)

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, items: int, seed: int, fresh: bool) -> SyntheticLoader:
        rank, world = ranks_of(self.trainer)
        n_batches = max(1, items // (self.batch_size * world))
        return SyntheticLoader(self.truth, self.batch_size, n_batches, seed, rank, fresh)

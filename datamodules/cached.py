"""Batches from an activation store."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from datamodules.options import ranks_of
from datamodules.sites import SitesDataModule
from mmsae.activations import ActivationStore, SideBySideLoader, StoreLoader, StoreSpec
from mmsae.activations.joined import open_stores
from mmsae.activations.loader import Split, listed_items
from mmsae.activations.resident import ResidentRows, make_resident
from mmsae.shards import UidList
from mmsae.types import InputError, Site


class CachedActivations(SitesDataModule):
    """Activations that ``mmsae extract`` stored, shuffled for training and in order for validation.

    The validation items are chosen by their uid, so they are the same for every seed, run and number of ranks. Nothing
    is read before ``setup``, except the store's spec when a width, a modality or a site is asked for.

    A training that goes on on another number of ranks keeps its batches (:class:`SharedBatches`).

    Args:
        store: Folder that ``mmsae extract`` wrote, or several of the same samples (other layers, other hosts),
            which are joined by uid; samples that are not in all of them are left out, and counted.
        batch_size: Items (token sites: rows of the modality with most) per batch and rank.
        val_fraction: Share of the items that training never sees; 0: no validation.
        seed: Seed of the training order.
        sites: ``{modality: site}`` where the store has several per modality, or to use one modality only; or one site.
        quotas: ``{modality: rows per batch}`` for token sites.
        block: Neighbouring rows that are read together.
        window: Blocks that are mixed with each other.
        verify: Whether to compare the content hash of every file; by default where the store is below 2 GB.
        uids: Whether training batches carry uids, by which a growing dictionary names its atoms.
        resident: Whether ``fit`` moves the store's rows to the trainer's device once, as stored, and gathers batches
            there. ``auto``: to a GPU, where they take at most half of its free memory; else batches are read from disk,
            and sent to a GPU while the step before them runs. The batches are the same in any case.
        keep: File of uids (``uids.npy`` of ``mmsae filter``, or DataComp's): only items whose uid it lists are used, as
            if the store held no others.
    """

    def __init__(
        self,
        store: list[str] | str,
        batch_size: int = 512,
        val_fraction: float = 0.1,
        seed: int = 0,
        sites: dict[str, str] | str | None = None,
        quotas: dict[str, int] | None = None,
        block: int = 256,
        window: int = 64,
        verify: bool | None = None,
        uids: bool = False,
        resident: bool | Literal["auto"] = "auto",
        keep: str | None = None,
    ) -> None:
        super().__init__(sites)
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction is {val_fraction:g}, it must be at least 0 and below 1")
        if min(batch_size, block, window) < 1:
            raise InputError(
                f"batch_size, block and window are {batch_size}, {block} and {window}, all must be above 0"
            )
        self.store, self.batch_size, self.val_fraction, self.seed = store, batch_size, val_fraction, seed
        self.quotas, self.block, self.window, self.verify = quotas, block, window, verify
        self.uids, self.resident, self.keep = uids, resident, keep
        self._moved: dict[torch.device, ResidentRows | None] = {}  # what was decided for which device, for all sites
        self.activations: ActivationStore | None = None

    @cached_property
    def spec(self) -> StoreSpec:
        """The store's spec.

        Raises:
            InputError: There is no store, or no whole one.
        """
        if isinstance(self.store, str):
            return StoreSpec.load(self.store)
        self.setup()  # what stores have in common is in their uids
        return self.activations.spec

    def at(self, name: str) -> SitesDataModule:
        _ = self.spec  # read once, and not for every choice
        return super().at(name)

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width: one number, or one per modality where they differ."""
        return self.spec.d_in(self.chosen_sites)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch holds."""
        return tuple(self.spec.choose(self.chosen_sites))

    @property
    def sites(self) -> dict[str, Site]:
        """Where the activations were read."""
        return {m: self.spec.sites[n] for m, n in self.spec.choose(self.chosen_sites).items()}

    def setup(self, stage: str | None = None) -> None:
        if self.activations is None:
            self.activations = open_stores(self.store, self.verify)
            for folder, n in getattr(self.activations, "left_out", {}).items():
                if n:
                    rank_zero_info(f"{folder}: {n:,} of {n + len(self.activations):,} items are not in all stores")
            if self._list is not None:
                rank_zero_info(self._list.said(self._items))

    @cached_property
    def _list(self) -> UidList | None:
        return UidList.of(self.keep)

    @cached_property
    def _items(self) -> int:
        """Items that are used."""
        return int(listed_items(self.activations, self._list).sum())

    def train_dataloader(self) -> StoreLoader | SideBySideLoader:
        """Shuffled batches of the training items; can be resumed in the middle of an epoch."""
        return self._loaders((self.val_fraction, 1.0), shuffle=True)

    def val_dataloader(self) -> StoreLoader | SideBySideLoader | list:
        """The validation items in order, with their uids; nothing where ``val_fraction`` is 0."""
        return self._loaders((0.0, self.val_fraction), shuffle=False) if self.val_fraction else []

    def test_dataloader(self) -> StoreLoader | SideBySideLoader:
        """The validation items, or all where ``val_fraction`` is 0."""
        return self._loaders((0.0, self.val_fraction or 1.0), shuffle=False)

    def predict_dataloader(self) -> StoreLoader | SideBySideLoader:
        """All items in order."""
        return self._loaders((0.0, 1.0), shuffle=False)

    def _loaders(self, split: tuple[float, float], shuffle: bool) -> StoreLoader | SideBySideLoader:
        self.setup()
        loaders = {name: self.at(name)._loader(split, shuffle) for name in self.choices}
        own = list(loaders.values()) or [self._loader(split, shuffle)]
        device, rows = self._device_rows({n: n for loader in own for n in loader.names.values()})
        for loader in own:
            loader.put(device, rows and rows.at(loader.names))
        return SideBySideLoader(loaders) if loaders else own[0]

    def _loader(self, split: tuple[float, float], shuffle: bool) -> StoreLoader:
        trainer, (rank, world), n = self.trainer, ranks_of(self.trainer), self._items
        items = round(split[1] * n) - round(split[0] * n)
        if items < world:
            raise InputError(
                f"{self.activations.folder}: val_fraction {self.val_fraction:g} of {n} items leaves {items} to "
                f"{'train' if shuffle else 'validate'} on, fewer than the number of processes, {world}: give "
                f"--data.val_fraction {'less' if shuffle else f'0 (no validation) or at least {world / n:.2g}'}"
            )
        asked = {"batch_size": self.batch_size, "quotas": self.quotas}
        loader = StoreLoader(
            self.activations,
            self.batch_size,
            seed=self.seed,
            split=Split(*split, self._list),
            rank=rank,
            world=world,
            shuffle=shuffle,
            sites=self.chosen_sites,
            quotas=(shuffle and self.shares(world, asked)) or self.quotas,
            block=self.block,
            window=self.window,
            uids=self.uids or not shuffle,
        )
        if trainer and shuffle:
            loader.epoch = trainer.current_epoch
            if isinstance(trainer.limit_train_batches, int):
                # the loader must know where an epoch ends, or a checkpoint written there would go on beyond it
                loader.cut(trainer.limit_train_batches)
            self.begin(world, asked, loader.total)
        return loader

    def _device_rows(self, names: dict[str, str]) -> tuple[torch.device, ResidentRows | None]:
        """The trainer's device, and the rows of sites there; what is read once, in no training, is not moved."""
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        if trainer and trainer.state.fn != TrainerFn.FITTING:
            return device, None
        if device not in self._moved:
            self._moved[device], said = make_resident(self.activations, names, device, self.resident)
            if said:
                rank_zero_info(said)
        return device, self._moved[device]

    @property
    def resident_bytes(self) -> int:
        """Bytes of the store's rows that are on the trainer's device."""
        return sum(rows.nbytes for rows in self._moved.values() if rows)

    def teardown(self, stage: str) -> None:
        """Leave the device's memory to others."""
        super().teardown(stage)
        self._moved.clear()

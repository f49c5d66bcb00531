"""Batches of several choices of a store's sites, in step, for SAEs that are trained together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmsae.activations.loader import StoreLoader
from mmsae.types import InputError, SideBySide, Tokens


class SideBySideLoader:
    """Loaders of the same data at different sites, each giving the batches that it gives for itself.

    Pooled sites of a store have the same items in the same order. Where sites have different numbers of rows, an epoch
    is as long as the longest of theirs: a shorter one begins its next epoch by itself, in training, and is absent from
    the rest of a validation.

    Args:
        loaders: ``{sites: loader}``.
    """

    def __init__(self, loaders: Mapping[str, StoreLoader]) -> None:
        self.loaders = dict(loaders)
        self.batch, self._begun = 0, False
        self._running: dict[str, Iterator[Tokens]] = {}

    def __len__(self) -> int:
        return max(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[SideBySide]:
        if not all(loader.shuffle for loader in self.loaders.values()):
            return self._once()
        if self._begun or self.batch >= len(self):
            self.batch = 0
        self._begun = False
        for name, loader in self.loaders.items():
            if len(loader) == len(self):  # its epochs are those of all
                self._running.pop(name, None)
        return self._train(self.batch)

    def _once(self) -> Iterator[SideBySide]:
        running = {name: iter(loader) for name, loader in self.loaders.items()}
        for _ in range(len(self)):
            found = {name: next(batches, None) for name, batches in running.items()}
            yield SideBySide({name: tokens for name, tokens in found.items() if tokens is not None})

    def _train(self, first: int) -> Iterator[SideBySide]:
        for b in range(first, len(self)):
            of = {name: self._next(name) for name in self.loaders}
            self.batch, self._begun = b + 1, True
            yield SideBySide(of)

    def _next(self, name: str) -> Tokens:
        if name in self._running and (tokens := next(self._running[name], None)) is not None:
            return tokens
        self._running[name] = iter(self.loaders[name])
        return next(self._running[name])

    def state_dict(self) -> dict[str, Any]:
        """The place of each in its own sequence."""
        return {"batch": self.batch, "loaders": {name: loader.state_dict() for name, loader in self.loaders.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, at the next ``iter()``.

        Raises:
            InputError: The state is of other sites, or belongs to another order.
        """
        saved = state.get("loaders", {})
        if saved.keys() != self.loaders.keys():
            then, now = (" and ".join(names) or "of one SAE" for names in (saved, self.loaders))
            raise InputError(
                f"the checkpoint was made at the sites {then}, this run reads {now}; resuming would not continue the "
                "same run"
            )
        for name, loader in self.loaders.items():
            loader.load_state_dict(saved[name])
        self.batch, self._begun, self._running = state["batch"], False, {}

"""Batches that stay what they are when a training goes on on another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from mmsae.types import InputError


class SharedBatches(lightning.LightningDataModule):
    """Base of datamodules whose ranks share a batch: its rows of all ranks together are those it was begun with.

    A checkpoint says how many rows, and which options made them. A run with the same options on another number of ranks
    has that batch, of which every rank takes an equal share; one with other options has what they say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.choice = ""  #: Which of several choices of sites this one reads; batches may differ in size between them.
        self._begun: dict[str, dict[str, Any]] = {}

    def shares(self, world: int, asked: Mapping[str, Any]) -> dict[str, int] | None:
        """``{modality: rows of a batch}`` for each of ``world`` ranks; None: what the options ``asked`` say.

        Raises:
            InputError: So many ranks cannot share the batches of a checkpoint evenly.
        """
        then = self._begun.get(self.choice, {})
        if then.get("asked") != asked:
            return None
        rows, name = then["rows"], _named(then["rows"])
        if any(n % world for n in rows.values()):
            raise InputError(
                f"the training was begun with batches of {name} rows over all ranks, which {world} ranks cannot share "
                "evenly: use a number of ranks that divides them"
            )
        found = {m: n // world for m, n in rows.items()}
        if world != then["world"]:
            ranks = "1 rank" if then["world"] == 1 else f"{then['world']} ranks"
            rank_zero_info(
                f"the training was begun on {ranks}: batches keep their {name} rows over all ranks, {_named(found)} on "
                f"each of {world}"
            )
        return found

    def begin(self, world: int, asked: Mapping[str, Any], rows: Mapping[str, int]) -> None:
        """Note the batches of a training, unless a checkpoint said them: rows of all ranks, and what made them."""
        fits = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fits and self._begun.get(self.choice, {}).get("asked") != asked:
            self._begun[self.choice] = {"world": world, "rows": dict(rows), "asked": dict(asked)}

    def state_dict(self) -> dict[str, Any]:
        """The batches of the training."""
        return dict(self._begun)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the batches of a checkpoint."""
        self._begun.clear()
        self._begun.update(state)

    def teardown(self, stage: str) -> None:
        """Leave the batches of a training to it."""
        self._begun.clear()


def _named(rows: Mapping[str, int]) -> str:
    if len(set(rows.values())) == 1:
        return f"{next(iter(rows.values())):,}"
    return " and ".join(f"{n:,} {m}" for m, n in rows.items())

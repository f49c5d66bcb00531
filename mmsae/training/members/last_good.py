"""What a member was at the checkpoint before it diverged: it stays so, in this run and in its checkpoints.

The checkpoint that a run wrote last holds no member that is not finite, for none is written before that was looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor

from mmsae.training.checkpoint import AtomicCheckpointIO, RunCheckpoint

STEPPERS = ("optimizer_states", "lr_schedulers")  # where Lightning's checkpoints have them


class LastGood(NamedTuple):
    """A member's part of a checkpoint; tensors are read from the file when they are used."""

    step: int  #: After which it was written.
    state: dict[str, Tensor]  #: The member's state dictionary.
    steppers: dict[str, dict[str, Any]]  #: ``{key: state}`` of its optimiser and its schedule; see :data:`STEPPERS`.
    callbacks: dict[str, Any]  #: ``{key: state}`` of its copies of callbacks.


def last_good(trainer: pl.Trainer, member: str, prefix: str) -> LastGood | None:
    """A member's part of the checkpoint that a run wrote last, or else went on from.

    Args:
        trainer: With a :class:`RunCheckpoint`; without one nothing is found.
        member: Its name.
        prefix: Of its entries in the state dictionary.

    Returns:
        None before the first checkpoint, and where the member had stopped already.
    """
    paths = [c.written for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint) and c.written]
    if not paths:
        return None
    reader = AtomicCheckpointIO()
    reader.mapped = "://" not in paths[0]
    saved = reader.load_checkpoint(paths[0])
    if member in saved["mmsae"]["stopped"]:
        return None
    state = {k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix)}
    steppers = {key: of[0]["members"] for key in STEPPERS if (of := saved.get(key))}
    steppers = {key: members[member] for key, members in steppers.items() if member in members}
    copies = {key: s[member] for key, s in saved["callbacks"].items() if isinstance(s, Mapping) and member in s}
    return LastGood(saved["global_step"], state, steppers, copies)

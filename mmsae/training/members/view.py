"""How one member sees the run: a trainer with its own folder, optimiser and figures; callbacks with a copy for each."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from mmsae.training.callbacks import ExportSAE
from mmsae.training.lit import NotFinite
from mmsae.training.members import table
from mmsae.types import SideBySide

_HOOKS = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]


def named(name: str, member: str) -> str:
    """The name of a member's figure: ``val/fvu/image`` is ``val/MEMBER/fvu/image``, ``fvu/image`` is of training."""
    stage, _, rest = name.partition("/")
    return f"{stage}/{member}/{rest}" if stage in ("train", "val", "test") else f"train/{member}/{name}"


class MemberTrainer:
    """The run's trainer, but that folder, optimisers, data and figures are one member's.

    Args:
        trainer: The run's.
        member: Name of the member.
        choice: Name of the sites that it reads, where members read at different ones.

    Attributes:
        default_root_dir: ``RUN/NAME``.
    """

    def __init__(self, trainer: Any, member: str, choice: str | None = None) -> None:
        self._trainer, self._member, self._choice = trainer, member, choice
        self.default_root_dir = str(Path(trainer.default_root_dir) / member)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    @property
    def optimizers(self) -> list[Any]:
        """The member's own."""
        return [o.members[self._member] for o in self._trainer.optimizers if self._member in getattr(o, "members", ())]

    @property
    def datamodule(self) -> Any:
        """The run's, at the member's sites."""
        data = self._trainer.datamodule
        return data if self._choice is None else data.at(self._choice)

    @property
    def train_dataloader(self) -> Any:
        """What its rows come from."""
        loader = self._trainer.train_dataloader
        return getattr(loader, "loaders", {}).get(self._choice, loader)

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The member's figures, by the names that they have in a run of one SAE."""
        own = {}
        for name, value in self._trainer.callback_metrics.items():
            stage, _, rest = name.partition("/")
            member, _, figure = rest.partition("/")
            if member == self._member:
                own[f"{stage}/{figure}"] = value
        return own


class EachMember(Callback):
    """A copy of a callback for each member, which sees the run as one of that member alone.

    It has the hooks that the callback has. Members that have stopped are left out, and what a member's copy finds not
    finite stops that member.

    Attributes:
        copies: ``{name: callback}``.
    """

    def __init__(self, callback: Callback, names: Iterable[str]) -> None:
        self.copies = {name: copy.deepcopy(callback) for name in names}
        for hook in _HOOKS:
            if getattr(type(callback), hook) is not getattr(Callback, hook):
                setattr(self, hook, partial(self._call, hook))

    def _call(self, hook: str, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        for name, member in module.running().items():
            own = [module.batch_of(name, a) if isinstance(a, SideBySide) else a for a in args]
            if any(a is None and isinstance(b, SideBySide) for a, b in zip(own, args, strict=True)):
                continue
            try:
                getattr(self.copies[name], hook)(module.view(name, trainer), member, *own, **kwargs)
            except NotFinite as e:
                module.stop(name, str(e))

    def put_back(self, name: str, trainer: Any, module: Any, steps: int, states: Mapping[str, Any]) -> None:
        """Set the copy of a member that stopped back to what it was after ``steps``, for what it then writes."""
        own = self.copies[name]
        if self.state_key in states:
            own.load_state_dict(states[self.state_key])
        if isinstance(own, ExportSAE):
            own.keep_last_good(module.view(name, trainer), module.each()[name], steps, module.stopped[name])

    @property
    def state_key(self) -> str:
        return next(iter(self.copies.values())).state_key

    def state_dict(self) -> dict[str, Any]:
        return {name: copied.state_dict() for name, copied in self.copies.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, copied in self.copies.items():
            copied.load_state_dict(state[name])


def for_each_member(callbacks: Iterable[Callback], names: Iterable[str]) -> list[Callback]:
    """A trainer's callbacks, where it trains several SAEs: those that act on an SAE have a copy for each.

    Which do, they say themselves by ``each_member = True``.
    """
    names = list(names)
    return [EachMember(c, names) if getattr(c, "each_member", False) else c for c in callbacks]


class MemberTable(Callback):
    """Writes the table of members when all are written (:mod:`mmsae.training.members.table`).

    Args:
        options: ``{name: {dotted option: value}}``.
    """

    def __init__(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        self.options = options

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero:
            table.write(Path(trainer.default_root_dir), self.options, module.stopped, module.good)

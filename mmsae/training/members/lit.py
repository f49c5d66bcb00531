"""The LightningModule around several SAEs: every batch goes through all of them, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from mmsae.sae import fit_rows
from mmsae.sae.normaliser import Normaliser
from mmsae.training.lit import LitSAE, NotFinite
from mmsae.training.members.last_good import STEPPERS, last_good
from mmsae.training.members.optimizer import MemberOptimizers, MemberSchedules, with_gradients, without_gradients
from mmsae.training.members.sites import Sites, choice
from mmsae.training.members.view import EachMember, MemberTrainer, named
from mmsae.types import InputError, SideBySide, Tokens


class LitSAEs(pl.LightningModule):
    """Trains several SAEs on the same batches of :class:`mmsae.types.Tokens`.

    Each becomes what a run of its own on the same data would make of it, on the CPU to the bit: it has optimiser,
    schedule, usage, normaliser, clipping and seed for itself, and its initial weights are drawn from that seed. What is
    saved is the reading of the data and the host's work for it; steps add up, and so does the memory of weights and
    optimisers. The graph of one member is held at a time.

    A member that is no longer finite is stopped at the next logged step, where a run of its own would end, and the
    others go on. It is put back to what the checkpoint before held, where there is one, its optimiser and schedule too,
    though it is trained no more: moments that are not finite are nobody's. Later checkpoints keep that, and it is
    written as ``sae-last-good``. Like a run of its own it leaves ``sae-best``, of its last good validation, and no
    ``sae``; when all is written the run ends with an error that names it.

    Args:
        members: ``{name: LitSAE}``; names become folders. One without ``seed`` draws from torch's global generator.
        sites: ``{name: sites}`` where members read at different ones, each as the datamodule takes sites of one SAE;
            None: what the datamodule was given itself.

    Raises:
        InputError: There is no member, or its name cannot be a folder.
    """

    def __init__(self, members: Mapping[str, LitSAE], sites: Mapping[str, Sites] | None = None) -> None:
        super().__init__()
        if not members:
            raise InputError("there is no member to train")
        if sites is not None and sites.keys() != members.keys():
            raise InputError(f"sites are given for {', '.join(sites)}, the members are {', '.join(members)}")
        for name, member in members.items():
            if not re.fullmatch(r"[\w=+.-]*\w[\w=+.-]*", name):
                raise InputError(f"{name!r} cannot name a member: give letters, digits and -_.=+")
            member.member = name
        self.saes = nn.ModuleDict({_key(name): member for name, member in members.items()})
        self.stopped: dict[str, str] = {}  #: ``{name: why}`` of those that are trained no longer.
        self.good: dict[str, int] = {}  #: ``{name: step}`` that those were put back to.
        self.total_steps: int | None = None
        self.choices = {choice(given): given for given in (sites or {}).values()}
        self._choice = {name: choice(given) for name, given in (sites or {}).items()}
        self._notes: dict[str, list[str]] = {}

    def each(self) -> dict[str, LitSAE]:
        """``{name: member}``, of all."""
        return {member.member: member for member in self.saes.values()}

    def running(self) -> dict[str, LitSAE]:
        """``{name: member}`` of those that have not stopped."""
        return {name: member for name, member in self.each().items() if name not in self.stopped}

    def stop(self, name: str, why: str) -> None:
        """Train a member no longer; on rank 0, which writes, it is what it was at the checkpoint before.

        Raises:
            NotFinite: It was the last one.
        """
        self.stopped[name] = why
        said = [f"{name} {why}"]
        if self.trainer.is_global_zero and (good := last_good(self.trainer, name, f"saes.{_key(name)}.")):
            self.good[name] = good.step
            self.each()[name].load_state_dict(good.state)
            for key, state in good.steppers.items():
                self._steppers()[key].put_back(name, state)
            for callback in self.trainer.callbacks:
                if isinstance(callback, EachMember):
                    callback.put_back(name, self.trainer, self, good.step, good.callbacks)
            said.append(f"it is kept as after step {good.step:,}")
        rank_zero_info("; ".join([*said, *["the others go on"] * bool(self.running())]))
        if not self.running():
            raise self._said_of_stopped()

    def _steppers(self) -> dict[str, MemberOptimizers | MemberSchedules]:
        """By their names in a checkpoint; nothing where there is nothing to train."""
        run = self.trainer
        every = (run.optimizers, [c.scheduler for c in run.lr_scheduler_configs])
        return {key: own[0] for key, own in zip(STEPPERS, every, strict=True) if own}

    def _said_of_stopped(self) -> NotFinite:
        whys: dict[str, list[str]] = {}
        for name, why in self.stopped.items():
            whys.setdefault(why, []).append(name)
        said = "; ".join(f"{', '.join(names)} {why}" for why, names in whys.items())
        error = NotFinite(f"{len(self.stopped)} of {len(self.each())} members have no result: {said}")
        error.stopped, error.good = dict(self.stopped), dict(self.good)
        return error

    def view(self, name: str, trainer: Any = None) -> MemberTrainer:
        """The trainer as a member sees it."""
        return MemberTrainer(trainer or self.trainer, name, self._choice.get(name))

    def data_of(self, name: str, data: Any) -> Any:
        """A datamodule as a member sees it."""
        return data.at(self._choice[name]) if self.choices else data

    def batch_of(self, name: str, batch: Tokens | SideBySide) -> Tokens | None:
        """A member's share of a batch; None where a validation is done with its rows."""
        return batch.of.get(self._choice[name]) if isinstance(batch, SideBySide) else batch

    def share_sites(self, data: Any) -> None:
        """Have a datamodule read at the sites of all members.

        Raises:
            InputError: It reads for one SAE only.
        """
        if self.choices:
            if not hasattr(data, "read_at"):
                raise InputError(f"members have sites of their own, and {type(data).__name__} has one batch for all")
            data.read_at(self.choices)

    def note(self, name: str, text: str) -> None:
        """Gather what members say, so that what several say is said once."""
        self._notes.setdefault(text, []).append(name)

    def _say(self) -> None:
        for text, names in self._notes.items():
            rank_zero_info(text if len(names) == len(self.each()) else f"{', '.join(names)}: {text}")
        self._notes.clear()

    def log_member(self, name: str, values: Mapping[str, Any], prog_bar: bool = False, **kwargs: Any) -> None:
        """Log figures under a member's name; the progress bar has room for those of one."""
        first = next(iter(self.running()), None)
        self.log_dict({named(k, name): v for k, v in values.items()}, prog_bar=prog_bar and name == first, **kwargs)

    def setup(self, stage: str) -> None:
        """Set every member up with the draws of a run of its own.

        Raises:
            InputError: One does not fit the data, or the precision is 16-mixed.
        """
        if self.trainer.precision == "16-mixed" and len(self.saes) > 1:
            raise InputError(
                f"precision 16-mixed scales the gradients of all {len(self.saes)} members by one factor and leaves a "
                "step of all out where one overflows: use bf16-mixed or 32-true"
            )
        self.share_sites(self.trainer.datamodule)
        for name, member in self.each().items():
            member.trainer = self.view(name)
            with as_member(name), drawing_from(member.seed):
                member.setup(stage)
        # see LitSAE.setup
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what every member was asked for, and which have stopped."""
        parts: dict[str, dict[str, Any]] = {name: {} for name in self.each()}
        for name, member in self.each().items():
            try:
                member.on_save_checkpoint(parts[name])
            except NotFinite as e:
                if name in self.stopped:  # before the first checkpoint
                    continue
                self.stop(name, str(e))
                start = f"saes.{_key(name)}."
                checkpoint["state_dict"] |= {start + k: v for k, v in member.state_dict().items()}
                for key, every in self._steppers().items():
                    if name in every.members and checkpoint.get(key):
                        checkpoint[key][0]["members"][name] = every.members[name].state_dict()
        members = {name: part["mmsae"] for name, part in parts.items()}
        checkpoint["mmsae"] = {"members": members, "stopped": dict(self.stopped), "good": dict(self.good)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint is of these very members.

        Raises:
            InputError: It is of one SAE, of others, or of a member with other options.
        """
        saved, own = checkpoint.get("mmsae", {}).get("members"), self.each()
        if saved is None:
            raise InputError("the checkpoint is of a run of one SAE, this run has members: give no --ckpt_path")
        odd = [f"only the checkpoint has {n}" for n in saved if n not in own]
        odd += [f"only this run has {n}" for n in own if n not in saved]
        if odd:
            raise InputError(
                f"the checkpoint is of other members: {'; '.join(odd)}; give its members, or no --ckpt_path"
            )
        for name, member in own.items():
            start = f"saes.{_key(name)}."
            state = {k.removeprefix(start): v for k, v in checkpoint["state_dict"].items() if k.startswith(start)}
            part = {"state_dict": state, "mmsae": saved[name], "global_step": checkpoint["global_step"]}
            with as_member(name):
                member.on_load_checkpoint(part)
        self.stopped = dict(checkpoint["mmsae"]["stopped"])
        self.good = dict(checkpoint["mmsae"].get("good", {}))

    def transfer_batch_to_device(self, batch: Tokens | SideBySide, device: torch.device, dataloader_idx: int) -> Tokens:
        """Once for all members."""
        return next(iter(self.saes.values())).transfer_batch_to_device(batch, device, dataloader_idx)

    def on_fit_start(self) -> None:
        """Fit normalisers on one sample, equal ones once, unless a checkpoint brought them."""
        waiting = {name: m for name, m in self.running().items() if not m.sae.normaliser.fitted}
        if not waiting:
            return
        most = max(m.normaliser_rows for m in waiting.values())
        samples = self._samples(most)
        fitted: dict[str, Normaliser] = {}
        for name, m in waiting.items():
            normaliser, at = m.sae.normaliser, self._choice.get(name)
            key = repr((at, normaliser.config(), m.sae.d_in, m.normaliser_rows))
            with as_member(name):
                m.start_on({k: x[: m.normaliser_rows] for k, x in samples[at].items()}, fitted.get(key))
            fitted.setdefault(key, normaliser)

    def _samples(self, rows: int) -> dict[str | None, dict[str, Tensor]]:
        """``{choice of sites: {modality: (N, d)}}``, the first rows of a training, of all choices in one pass."""
        batches = self.trainer.datamodule.train_dataloader()
        if not self.choices:
            return {None: fit_rows(batches, rows)}
        if loaders := getattr(batches, "loaders", None):  # of a store: each as far as its own epoch goes
            return {name: fit_rows(loader, rows) for name, loader in loaders.items()}
        apart = (Tokens({(n, m): x for n, t in b.of.items() for m, x in t.x.items()}, {}) for b in batches)
        found: dict[str | None, dict[str, Tensor]] = {name: {} for name in self.choices}
        for (name, m), x in fit_rows(apart, rows).items():
            found[name][m] = x
        return found

    def on_train_start(self) -> None:
        for member in self.running().values():
            member.on_train_start()
            self.total_steps = member.total_steps
        self._say()

    def training_step(self, batch: Tokens | SideBySide, batch_idx: int) -> Tensor:
        """The sum of the members' losses, whose gradients are computed when it is returned."""
        losses = []
        for name, member in self.each().items():
            weights = [p for p in member.sae.parameters() if p.requires_grad]
            if name in self.running():
                try:
                    loss = member.training_step(self.batch_of(name, batch), batch_idx)
                    if len(self.saes) > 1:  # else Lightning may scale it
                        loss = with_gradients(loss, weights, self.trainer.accumulate_grad_batches)
                    losses.append(loss)
                    continue
                except NotFinite as e:
                    self.stop(name, str(e))
            if self.trainer.world_size > 1 and weights:
                losses.append(without_gradients(weights))
        self._say()
        return torch.stack(losses).sum()

    def validation_step(self, batch: Tokens | SideBySide, batch_idx: int) -> None:
        for name, member in self.running().items():
            if (own := self.batch_of(name, batch)) is not None:
                member.validation_step(own, batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        for member in self.running().values():
            member.on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        for member in self.running().values():
            member.on_test_epoch_end()

    def predict_step(self, batch: Tokens | SideBySide, batch_idx: int) -> dict:
        """Codes of a batch, ``{name: {modality: Codes}}``."""
        own = {name: (member, self.batch_of(name, batch)) for name, member in self.running().items()}
        return {name: member.predict_step(b, batch_idx) for name, (member, b) in own.items() if b is not None}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for member in self.running().values():
            member.on_before_optimizer_step(optimizer)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip the gradients of each member by their own norm."""
        for name, own in getattr(optimizer, "members", {}).items():
            if name in self.running():
                super().configure_gradient_clipping(own, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for member in self.running().values():
            member.after_step_()

    def lr_scheduler_step(self, scheduler: MemberSchedules, metric: Any) -> None:
        scheduler.step()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Nothing where there is nothing to train."""
        if loss.requires_grad:
            super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        made = {name: member.configure_optimizers() for name, member in self.each().items()}
        made = {name: m if isinstance(m, dict) else {"optimizer": m} for name, m in made.items() if m is not None}
        if not made:
            return None
        optimizer = MemberOptimizers({name: m["optimizer"] for name, m in made.items()}, self.running)
        schedules = {name: m["lr_scheduler"]["scheduler"] for name, m in made.items() if "lr_scheduler" in m}
        if not schedules:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": MemberSchedules(schedules, optimizer), "interval": "step"},
        }

    def on_fit_end(self) -> None:
        """End with an error where a member stopped, now that all others are written.

        Raises:
            NotFinite: It names them.
        """
        if self.stopped:
            raise self._said_of_stopped()


def _key(name: str) -> str:
    """A member's name as torch's modules may be called; names have no commas."""
    return name.replace(".", ",")


@contextmanager
def as_member(name: str) -> Iterator[None]:
    """What is wrong with a member's input is said with its name."""
    try:
        yield
    except InputError as e:
        raise InputError(f"member {name}: {e}") from e


@contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
    """Draws of a run of its own with that seed, and none of this run's; None changes nothing."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        yield

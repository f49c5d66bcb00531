"""The loop over the batches of an epoch: Lightning's, without what takes time in every step and does nothing.

Lightning calls some forty hooks a step, most of them empty, each through wrappers that profile, note a name and ask for
properties: longer than a step of an SAE takes on a GPU. It also reads the values behind the progress bar after every
step, for which the host waits until the device is done. Here a step calls the hooks that somebody has overridden, and
reads values where they are logged. Order of hooks, counters and results are Lightning's, to the bit, and so are
checkpoints: either loop goes on with the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor

from mmsae.training.checkpoint import RunCheckpoint
from mmsae.types import SideBySide, Tokens

_HOOKS = (
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    "on_before_optimizer_step",
)
#: Hooks of a module that this loop does not know how to call.
_UNUSUAL = ("on_train_batch_start", "on_before_batch_transfer", "on_after_batch_transfer", "optimizer_zero_grad")


class _Results(_ResultCollection):
    """Logged values that remember whether any came in."""

    fresh = False

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.fresh = True
        super().log(*args, **kwargs)


class _Stepped(LightningOptimizer):
    """The optimiser as ``optimizer_step`` of a module gets it: its step runs the closure, then steps."""

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        result = None if closure is None else closure()
        self._optimizer.step(**kwargs)
        return result


class EpochLoop(_TrainingEpochLoop):
    """See the module; where a trainer is unusual (a profiler, a scaler, another strategy), it is Lightning's own."""

    def __init__(self, trainer: pl.Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps=min_steps, max_steps=max_steps)
        self._results = _Results(training=True)
        self._usual = False

    @classmethod
    def install(cls, trainer: pl.Trainer) -> None:
        """Have a trainer that has not begun use this loop."""
        own = trainer.fit_loop.epoch_loop
        trainer.fit_loop.epoch_loop = cls(trainer, own.min_steps, own.max_steps)

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        trainer, module = self.trainer, self.trainer.lightning_module
        self._usual = self._is_usual(data_fetcher)
        heard = any(isinstance(c, RunCheckpoint) for c in trainer.callbacks)  # it asks for itself, and less often
        self._broadcasts = trainer.world_size > 1 and not heard
        self._hooks: dict[str, list[Callable[..., Any]]] = {}
        for name in _HOOKS:
            called = [partial(fn, trainer, module) for c in trainer.callbacks if (fn := _overridden(c, name, Callback))]
            own = _overridden(module, name, pl.LightningModule)
            self._hooks[name] = called if own is None else [*called, own]
        if self._usual:
            data_fetcher._start_profiler = data_fetcher._stop_profiler = _nothing
            self._optimizer = _Stepped(trainer.optimizers[0])
            clips = _overridden(module, "configure_gradient_clipping", pl.LightningModule)
            self._clips = clips is not None or trainer.gradient_clip_val is not None
            self._weights = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]

    def _is_usual(self, data_fetcher: _DataFetcher) -> bool:
        trainer, module = self.trainer, self.trainer.lightning_module
        precision, data = trainer.precision_plugin, trainer.datamodule
        return (
            type(trainer.profiler) is PassThroughProfiler
            and type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)
            and getattr(trainer.strategy, "_model_averager", None) is None
            and (type(precision) is Precision or (type(precision) is MixedPrecision and precision.scaler is None))
            and module.automatic_optimization
            and len(trainer.optimizers) == 1
            and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
            and not any(_overridden(module, name, pl.LightningModule) for name in _UNUSUAL)
            and not any(_overridden(data, name, pl.LightningDataModule) for name in _UNUSUAL if data is not None)
        )

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """One batch."""
        if not self._usual or self.restarting:
            super().advance(data_fetcher)
            return
        trainer, progress = self.trainer, self.batch_progress
        self.val_loop.restarting = False
        if self._broadcasts:
            self._broadcast_sigterm_tensor()
        batch = self._on_device(next(data_fetcher)[0])
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        progress.increment_ready()
        connector = trainer._logger_connector
        connector.on_batch_start(batch)
        self._results.fresh = False
        self._call("on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        output = self._step(batch, batch_idx)
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._call("on_train_batch_end", output, batch, batch_idx)
        if self._results.fresh:
            connector.on_batch_end()
        self._results.batch = self._results.batch_size = None
        progress.increment_completed()
        connector.update_train_step_metrics()

    def _on_device(self, batch: Any) -> Any:
        device = self.trainer.strategy.root_device
        if isinstance(batch, (Tokens, SideBySide)) and batch.on(device):
            return batch
        return self.trainer.strategy.batch_to_device(batch, device)

    def _call(self, name: str, *args: Any) -> None:
        """The hook, of callbacks and of the module; what it logs is logged under its name."""
        if called := self._hooks[name]:
            state = self.trainer.lightning_module.__dict__  # setting an attribute of a module asks much more
            before, state["_current_fx_name"] = state["_current_fx_name"], name
            for fn in called:
                fn(*args)
            state["_current_fx_name"] = before

    def _step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Forward, backward and, at the last batch of those that are accumulated, the optimiser."""
        trainer, module = self.trainer, self.trainer.lightning_module
        counts = self.automatic_optimization.optim_progress.optimizer
        found: list[dict[str, Any]] = []
        closure = partial(self._gradients, batch, batch_idx, found)
        if self._should_accumulate():
            with _block_parallel_sync_behavior(trainer.strategy, block=True):
                closure()
            return found[0]

        def whole() -> Tensor:
            closure()
            self._call("on_before_optimizer_step", self._optimizer._optimizer)
            if self._clips:
                module.configure_gradient_clipping(
                    self._optimizer._optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
                )
            return found[0]["loss"]

        counts.step.increment_ready()
        module.optimizer_step(trainer.current_epoch, batch_idx, self._optimizer, whole)
        counts.step.increment_completed()
        return found[0]

    def _gradients(self, batch: Any, batch_idx: int, found: list[dict[str, Any]]) -> None:
        trainer, module, n = self.trainer, self.trainer.lightning_module, self.trainer.accumulate_grad_batches
        state = module.__dict__
        state["_current_fx_name"] = "training_step"
        output = trainer.strategy.training_step(batch, batch_idx)
        state["_current_fx_name"] = None
        output = dict(output) if isinstance(output, Mapping) else {"loss": output}
        loss = output["loss"] if n == 1 else output["loss"] / n
        found.append(output | {"loss": loss.detach()})
        if batch_idx % n == 0:
            zeroed = self.automatic_optimization.optim_progress.optimizer.zero_grad
            zeroed.increment_ready()
            self._call("on_before_zero_grad", self._optimizer._optimizer)
            zeroed.increment_started()
            for p in self._weights:
                p.grad = None
            zeroed.increment_completed()
        self._call("on_before_backward", loss)
        module.backward(loss)
        self._call("on_after_backward")


def _nothing() -> None:
    pass


def _overridden(owner: Any, name: str, base: type) -> Callable[..., Any] | None:
    """The method of an object, where it is not the one of its base."""
    fn = getattr(owner, name, None)
    return None if fn is None or getattr(fn, "__func__", fn) is getattr(base, name, None) else fn

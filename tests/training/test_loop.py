"""The loop over batches does what Lightning's does: hooks, counters, logs, checkpoints and weights, to the bit."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler

from mmsae.training.loop import EpochLoop
from tests.helpers.lit import Data, StopAt, lit, trainer

HOOKS = [
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_train_epoch_start"),
]
OPTIONS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed", "gradient_clip_val": None},
    "profiled": {"profiler": SimpleProfiler()},
}


class Record(pl.Callback):
    """Every hook, where it came, what it was given, and what it logs itself."""

    def __init__(self):
        self.seen = []
        for name in HOOKS:
            setattr(self, name, lambda t, m, *args, name=name: self._note(name, t, m, args))

    def _note(self, name, t, m, args):
        loop = t.fit_loop.epoch_loop
        counts = (t.global_step, t.current_epoch, loop.batch_idx, loop._batches_that_stepped, m._current_fx_name)
        given = [a["loss"].item() if isinstance(a, dict) else a for a in args if isinstance(a, (dict, int))]
        self.seen.append((name, counts, given))
        if name == "on_train_batch_end" and t.global_step % 4 == 1:
            m.log("mine", float(t.global_step), prog_bar=True)
        if name == "on_before_optimizer_step":
            m.log("norm", sum(p.grad.norm() for p in m.sae.parameters()))


def run(root, ours, steps=23, ckpt=None, stop=None, **options):
    record = Record()
    stops = [] if stop is None else [StopAt(stop)]
    t = trainer(
        root, steps, callbacks=[record, *stops], logger=CSVLogger(root, name="logs"), log_every_n_steps=4,
        val_check_interval=5, check_val_every_n_epoch=None, **options,
    )  # fmt: skip
    if ours:
        EpochLoop.install(t)
    module = lit()
    if stop is None:
        t.fit(module, datamodule=Data(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    else:
        with pytest.raises(BaseException):  # noqa: B017, Lightning turns the interrupt into SystemExit
            t.fit(module, datamodule=Data())
    metrics = sorted((root / "logs").rglob("metrics.csv"))
    metrics = [p.read_text() for p in metrics]
    return module.state_dict(), record.seen, metrics, {k: float(v) for k, v in t.callback_metrics.items()}, t


def last(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_is_lightnings_to_the_bit(tmp_path, name):
    a, b = (run(tmp_path / w, w == "ours", **OPTIONS[name]) for w in ("ours", "theirs"))
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1] == b[1] and len(a[1]) > 100
    assert a[2] == b[2] and "mine" in a[2][0] and a[3] == b[3] and "train/loss" in a[3]
    loop = a[4].fit_loop.epoch_loop
    assert isinstance(loop, EpochLoop) and loop._usual == (name != "profiled")
    saved = [last(tmp_path / w) for w in ("ours", "theirs")]
    assert saved[0]["loops"] == saved[1]["loops"] and saved[0]["lr_schedulers"] == saved[1]["lr_schedulers"]


@pytest.mark.parametrize("ours", [True, False])
def test_either_loop_goes_on_with_the_others_checkpoint(tmp_path, ours):
    whole = run(tmp_path / "whole", True)
    run(tmp_path / "cut", ours, stop=17)
    again = run(tmp_path / "cut", not ours, ckpt="last")
    assert all(torch.equal(whole[0][k], again[0][k]) for k in whole[0])
    assert again[1][-1] == whole[1][-1]

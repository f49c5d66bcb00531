"""The loop over batches does what Lightning's does: hooks, counters, logs, checkpoints and weights, to the bit."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler

from datamodules import CachedActivations
from mmsae.sae import TopK, UsageTracker
from mmsae.sae import usage as usage_module
from mmsae.sae.variants import matryoshka as matryoshka_module
from mmsae.training import LitSAE, Schedule
from mmsae.training.loop import EpochLoop
from mmsae.types import Codes
from tests.helpers.lit import Data, StopAt, lit, trainer
from tests.helpers.recipes import ROOT, SAE_RECIPES, small_model
from tests.helpers.training import make_store
from tests.helpers.waits import NoWaits, Waited

HOOKS = [
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_train_epoch_start"),
]
OPTIONS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
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


class Walk(pl.Callback):
    """Puts the mode around the batches of a training that are not logged."""

    def __init__(self):
        self.steps, self.mode = 0, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # the first steps ask for what is kept afterwards: lengths, moments, the bound of dead latents
        if trainer.global_step > 2 and (trainer.global_step + 1) % trainer.log_every_n_steps:
            self.mode = NoWaits()
            self.mode.__enter__()

    def on_train_batch_end(self, trainer, module, *args):
        if self.mode is not None:
            self.steps += 1
            self.on_exception()

    def on_exception(self, *args):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None


def on_a_device(monkeypatch):
    """Have everything take the path that it takes where the host does not wait."""
    for module in (usage_module, matryoshka_module):
        monkeypatch.setattr(module, "waits", lambda t: True)


# what their steps read, and why it cannot be sent ahead
WAITING = {
    **dict.fromkeys(
        ["batch_topk", "matryoshka", "matryoshka_sampled", "feature_choice"], "the width of a batch's codes"
    ),
    "omp_sae": "whether a system of equations can be solved",
    "itda": "how many atoms there are, of which a step adds some",
    "gradient_topk": "rows alone: these have no gradients",
    "usae": "a number that was drawn on the host",
}
STEPPED = [path for path in SAE_RECIPES if path.stem not in WAITING]


@pytest.mark.parametrize(
    ("path", "options"),
    [(path, {}) for path in STEPPED]
    + [(ROOT / "configs/sae/paired_topk.yaml", {"gradient_clip_val": 1.0})]
    + [(ROOT / "configs/sae/paired_topk.yaml", {"accumulate_grad_batches": 2})]
    + [(ROOT / "configs/sae/matryoshka.yaml", {})],
    ids=lambda given: given.stem if isinstance(given, Path) else "".join(given) or "plain",
)
def test_no_step_waits_for_a_device_but_those_that_are_logged(tmp_path, monkeypatch, path, options):
    on_a_device(monkeypatch)
    torch.manual_seed(0)
    sae, losses = small_model(path, d_in=10)
    if path.stem == "matryoshka":
        sae.selector = TopK(4)
    dying = path.stem in ("topk", "paired_topk", "matryoshka")
    if dying:
        with torch.no_grad():  # a latent that cannot fire
            sae.encoder.bias[3] = -1e4
    walk, module = Walk(), LitSAE(sae, losses, dead_after=50, scheduler=Schedule)
    t = trainer(tmp_path, 12, callbacks=[walk], log_every_n_steps=10, **options)
    EpochLoop.install(t)
    t.fit(module, datamodule=Data())
    assert walk.steps == (16 if "accumulate_grad_batches" in options else 8)
    assert not dying or len(module.usage.dead_ids(50)) > 0  # AuxK had some


def test_the_walk_finds_what_waits(tmp_path, monkeypatch):
    on_a_device(monkeypatch)
    for waiting in (
        lambda u, c: bool(u.tokens.sum()),
        lambda u, c: u.since.nonzero(),
        lambda u, c: u.since[u.since > 1],
    ):
        monkeypatch.setattr(UsageTracker, "update", waiting)
        t = trainer(tmp_path, 12, callbacks=[Walk()], log_every_n_steps=10)
        EpochLoop.install(t)
        with pytest.raises(Waited):
            t.fit(lit(), datamodule=Data())


def test_prefixes_on_a_device_are_those_on_the_host(monkeypatch):
    g = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(40, generator=g)[:6] for _ in range(20)])
    values = torch.randn(20, 6, generator=g).relu()
    codes, atoms = Codes(values, indices, 40), torch.randn(40, 5, generator=g)
    want = list(matryoshka_module.prefix_parts(codes, atoms, [2, 11, 30]))
    on_a_device(monkeypatch)
    got = list(matryoshka_module.prefix_parts(codes, atoms, [2, 11, 30]))
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["topk", "paired_topk", "vl_sae"])
def test_on_a_device_no_step_waits(tmp_path, recipe):
    """Torch itself raises at what waits; batches come from a resident store."""

    class Strict(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            quiet = trainer.global_step > 2 and (trainer.global_step + 1) % trainer.log_every_n_steps
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")

        def on_train_batch_end(self, *args):
            torch.cuda.set_sync_debug_mode("default")

    sae, losses = small_model(ROOT / "configs" / "sae" / f"{recipe}.yaml", d_in=16)
    data = CachedActivations(make_store(tmp_path / "store", dtype="bfloat16"), batch_size=32, resident=True)
    t = trainer(tmp_path, 30, callbacks=[Strict()], log_every_n_steps=10, accelerator="gpu", devices=1)
    EpochLoop.install(t)
    module = LitSAE(sae, losses, dead_after=200)
    t.fit(module, datamodule=data)
    assert t.global_step == 30 and data.resident_bytes == 0

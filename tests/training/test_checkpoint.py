"""A run stopped at any moment and resumed ends with the same bytes, the same best SAE and the same report."""

import json
import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger

from datamodules import CachedActivations
from mmsae import SAE
from mmsae.sae import AuxK, CodeCosine, Dictionary, Normaliser, TopK
from mmsae.sae import Reconstruction as ReconstructionLoss
from mmsae.training import DeadLatentReport, ExportSAE, LitSAE, RunCheckpoint
from tests.helpers.training import make_store

STEPS = 21


class Killed(Exception):
    """Nothing that Lightning treats gracefully."""


class KillFirst(pl.Callback):
    """Raises in the given hook at the given step, before any other callback."""

    def __init__(self, hook, step):
        setattr(self, hook, lambda trainer, *args: self._die(trainer, step))

    def _die(self, trainer, step):
        if trainer.global_step == step and trainer.state.fn == "fit":
            raise Killed


class KillLast(KillFirst, Checkpoint):
    """The same after all others: Lightning calls checkpoint callbacks last."""


class Tell(KillFirst):
    """SIGTERM in the given hook at the given step."""

    def _die(self, trainer, step):
        if trainer.global_step == step and trainer.state.fn == "fit":
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("resume") / "store", n=120, rows_per_shard=50)


def run(store, root, every=1, validate=5, kill=None, ckpt_path=None):
    """Training with 6 batches an epoch; ``kill`` is ``(callback class, hook, step)``."""
    torch.manual_seed(0)
    sae = SAE(
        ratio=3, normaliser=Normaliser(unit_in=True, centre=True, unit_out=True), selector=TopK(3),
        dictionaries={m: Dictionary() for m in ("image", "text")},
    )  # fmt: skip
    module = LitSAE(sae, [ReconstructionLoss(), AuxK(dead_after=100), CodeCosine()], dead_after=100)
    # this minimum is at the first validation: a resumed run that skipped it would end with another sae-best
    callbacks = [ExportSAE(monitor="val/explained_variance/joint"), DeadLatentReport(), RunCheckpoint(every)]
    if kill:
        callbacks.insert(0 if kill[0] is KillFirst else len(callbacks), kill[0](*kill[1:]))
    data = CachedActivations(store, batch_size=16, val_fraction=0.2, block=8, window=4)
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", default_root_dir=str(root), callbacks=callbacks,
        gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False,
        logger=CSVLogger(root, name="logs"),
        num_sanity_val_steps=0, log_every_n_steps=3, val_check_interval=validate, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)


def result(root):
    """What a run leaves, without checkpoints and what it put aside."""
    files = [p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.suffix != ".ckpt"]
    return {str(p): (root / p).read_bytes() for p in files if "earlier" not in str(p) and p.parts[0] != "logs"}


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """``{steps between validations: what the uninterrupted run left}``."""
    got = {}
    for validate in (5, 6):
        root = tmp_path_factory.mktemp("whole")
        run(store, root, validate=validate)
        got[validate] = result(root)
        assert {"sae/sae_weights.safetensors", "sae-best/cfg.json", "latents.json"} <= set(got[validate])
        training = json.loads(got[validate]["sae/cfg.json"])["mmsae"]["training"]
        assert training["steps"] == STEPS and training["validation"]["val/fvu/joint"] > 0
        best = json.loads(got[validate]["sae-best/cfg.json"])["mmsae"]["training"]["steps"]
        assert best == validate
    return got


IN_TRAINING = [(KillFirst, "on_train_batch_start"), (KillFirst, "on_train_batch_end"), (KillLast, "on_train_batch_end")]
IN_VALIDATION = [
    *((KillFirst, h) for h in ("on_validation_start", "on_validation_batch_end", "on_validation_end")),
    (KillLast, "on_validation_end"),
]
AT_THE_END = [(KillFirst, "on_train_end"), (KillLast, "on_train_end"), (KillFirst, "on_fit_end")]
CASES = [  # (steps between checkpoints, between validations, kill); 6, 12 and 18 are ends of epochs
    *((1, 5, (*k, step)) for k in IN_TRAINING for step in (4, 5, 6, 12)),
    *((1, 5, (*k, step)) for k in IN_VALIDATION for step in (5, 10)),
    *((every, 5, (*k, STEPS)) for k in AT_THE_END for every in (1, 50)),
    *((every, every, (*k, 2 * every)) for k in IN_TRAINING[1:] + IN_VALIDATION for every in (5, 6)),
]


def name(case):
    every, validate, (cls, hook, step) = case
    return f"{every}-{validate}-{hook}-{step}-{cls.__name__}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_run_killed_in_any_hook_resumes_to_the_same_result(store, whole, tmp_path, case):
    every, validate, kill = case
    with pytest.raises(Killed):
        run(store, tmp_path, every, validate, kill)
    run(store, tmp_path, every, validate, ckpt_path="last")
    got = result(tmp_path)
    assert set(got) == set(whole[validate])
    assert [k for k in got if got[k] != whole[validate][k]] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_train_start", 0, 1),  # a step is the least that is done
        ("on_train_batch_start", 4, 5),
        ("on_train_batch_end", 7, 7),
        ("on_train_batch_end", 12, 12),  # the end of an epoch
        ("on_validation_start", 5, 5),
        ("on_validation_batch_end", 10, 10),
        ("on_train_batch_end", STEPS, STEPS),
    ],
)
def test_a_run_told_to_stop_in_any_hook_saves_that_step(store, whole, tmp_path, hook, step, saved):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(store, tmp_path, every=50, kill=(Tell, hook, step))
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "sae").exists()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved
    run(store, tmp_path, every=50, ckpt_path="last")
    assert result(tmp_path) == whole[5]

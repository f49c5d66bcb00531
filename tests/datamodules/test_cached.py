"""CachedActivations: widths from the spec, disjoint splits, and exact resume through Lightning at every step."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import CachedActivations
from mmsae.activations import write_store
from mmsae.types import InputError, Site

N, D, BATCH = 60, 3, 10  # 54 training items: 5 batches an epoch and 4 items left out, others in each epoch


@pytest.fixture
def store(tmp_path):
    image = torch.arange(N).float()[:, None].expand(N, D).clone()
    return write_store(tmp_path / "store", {"image": image, "text": image + 1000})


class Recorder(pl.LightningModule):
    """A module whose parameters depend on every batch and its order."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(D))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        assert torch.equal(batch.x["text"], batch.x["image"] + 1000)
        self.seen.append(batch.x["image"][:, 0].int().tolist())
        return ((batch.x["image"] / N) @ self.w - self.w.square().sum()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.uids

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Killed(Exception):
    pass


class KillAfter(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Killed


def fit(store, root, *, stop=None, resume=False, resident="auto", **options):
    module, data = Recorder(), CachedActivations(str(store), BATCH, resident=resident)
    save = ModelCheckpoint(root, every_n_train_steps=1, save_last=True, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=17,
        callbacks=[save, *([KillAfter(stop)] if stop is not None else [])],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=root,
        **options,
    )
    if stop is None:
        trainer.fit(module, data, ckpt_path="last" if resume else None, weights_only=True)
    else:
        with pytest.raises(Killed):
            trainer.fit(module, data)
    return module


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, range(1, 17)),
        ({"val_check_interval": 2}, (4, 5, 6, 10)),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, (3, 5, 6, 9)),
        ({"limit_train_batches": 4}, (3, 4, 5, 8)),
    ],
    ids=["plain", "validation within epochs", "validation across epochs", "short epochs"],
)
@pytest.mark.filterwarnings("ignore")
def test_resume_at_any_step_sees_the_same_batches(store, tmp_path, options, stops):
    whole = fit(store, tmp_path / "whole", **options)
    assert len(whole.seen) == 17
    for stop in stops:
        first = fit(store, tmp_path / str(stop), stop=stop, **options)
        again = fit(store, tmp_path / str(stop), resume=True, **options)
        assert first.seen == whole.seen[:stop]
        assert again.seen == whole.seen[stop:], stop
        assert torch.equal(again.w, whole.w)


@pytest.mark.filterwarnings("ignore")
def test_what_a_fit_sees(store, tmp_path):
    module = fit(store, tmp_path / "run")
    data = CachedActivations(str(store), BATCH)
    data.setup()
    held_out = [int(u, 16) for b in data.val_dataloader() for u in b.uids]
    assert len(held_out) == 6 and {int(u, 16) for u in module.validated} == set(held_out)
    for epoch in range(3):
        rows = [r for batch in module.seen[5 * epoch : 5 * epoch + 5] for r in batch]
        assert len(set(rows)) == 50 and not set(rows) & set(held_out)
    assert module.seen[:5] != module.seen[5:10]


def test_the_state_can_be_loaded_without_unpickling(store, tmp_path):
    fit(store, tmp_path, stop=3)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state[0]["epoch"] == 0 and state[0]["batch"] == 3


def test_width_modalities_and_sites_come_from_the_spec(store, tmp_path):
    data = CachedActivations(str(store))
    assert data.d_in == D and data.modalities == ("image", "text") and data.activations is None
    assert data.sites["text"] == Site("", "text.embed", modality="text", width=D)
    one = CachedActivations(str(store), sites={"text": "text.embed"})
    assert one.modalities == ("text",) and set(next(iter(one.train_dataloader())).x) == {"text"}
    wide = write_store(tmp_path / "wide", {"image": torch.ones(9, 4), "text": torch.ones(9, 2)})
    assert CachedActivations(str(wide)).d_in == {"image": 4, "text": 2}


def test_nothing_is_read_before_it_is_needed():
    data = CachedActivations("no-such-store")
    for use in (data.setup, lambda: data.d_in, lambda: data.sites):
        with pytest.raises(InputError, match="no-such-store: there is no such folder"):
            use()
    with pytest.raises(InputError, match="no activation store is given"):
        CachedActivations("").setup()


@pytest.mark.parametrize("wrong", [{"val_fraction": 1.0}, {"val_fraction": -0.1}, {"batch_size": 0}, {"window": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        CachedActivations("store", **wrong)


def test_without_validation_all_items_train_and_all_are_tested(store):
    data = CachedActivations(str(store), 7, val_fraction=0)
    assert data.val_dataloader() == []
    assert sum(len(b.x["image"]) for b in data.train_dataloader()) == 56
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert torch.cat([b.x["image"][:, 0] for b in loader]).tolist() == list(range(N))


def test_resident_rows_change_nothing(store, tmp_path):
    """A run on them is the run on the disk, and each goes on with the other's checkpoint."""
    want = fit(store, tmp_path / "disk")
    got = fit(store, tmp_path / "all", resident=True)
    assert got.seen == want.seen and torch.equal(got.w, want.w) and got.validated == want.validated
    for before, after in ((True, False), ("auto", True)):
        root = tmp_path / str(before)
        first = fit(store, root, stop=7, resident=before)
        again = fit(store, root, resume=True, resident=after)
        assert first.seen + again.seen == want.seen and torch.equal(again.w, want.w)


def test_what_is_read_once_is_not_moved(store, tmp_path):
    data = CachedActivations(str(store), BATCH, resident=True)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path))
    trainer.validate(Recorder(), datamodule=data, verbose=False)
    assert data.resident_bytes == 0
    list(CachedActivations(str(store), BATCH, resident=True).train_dataloader())  # without a trainer

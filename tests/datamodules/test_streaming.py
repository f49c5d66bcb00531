"""StreamingActivations: a tiny CLIP from disk, its widths known without weights, through a Trainer."""

import io
import json
import multiprocessing
import os
import subprocess
import time

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from datamodules import StreamingActivations
from mmsae.shards import ShardWriter
from mmsae.training import RunCheckpoint
from mmsae.types import InputError


def png(i):
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (4 * i % 256, 100, 50)).save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 12, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 16}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, per_shard=20) as w:
        for i in range(60):
            w.write(f"{i:04d}", {"png": png(i), "txt": f"number {i}"})
    return str(folder)


def make(shards, host, **kw):
    options = {"batch_size": 8, "buffer_pairs": 16, "read_batch": 10, "workers": 0, "allow_random": True, "shuffle": 5}
    return StreamingActivations(shards, host, **(options | kw))


def test_nothing_is_loaded_before_setup(host):
    data = make("no-such-shards-*.tar", host)
    assert data.d_in == 6 and data.modalities == ("image", "text") and data.sites == {} and data.loaded_host is None
    sites = {"image": "visual.transformer.resblocks.0:out[patches]", "text": "transformer.resblocks.0:out[mask]"}
    assert make("none", host, sites=sites).d_in == {"image": 16, "text": 12}
    assert make("none", host, d_in=6).d_in == 6


class Seen(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.train_batches, self.val_rows = [], 0

    def training_step(self, batch, batch_idx):
        self.train_batches.append(batch)
        return self.w.sum() * batch.x["image"].sum()

    def validation_step(self, batch, batch_idx):
        self.val_rows += len(batch.x["text"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_fit(host, shards, tmp_path):
    data, module = make(shards, host, val_shards=shards), Seen()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, data)
    assert len(module.train_batches) == 2 * (60 // 8) and module.val_rows == 2 * 60
    assert {tuple(b.x[m].shape) for b in module.train_batches for m in b.x} == {(8, 6)}
    assert data.sites["image"].width == 6 and data.sites["image"].host == data.loaded_host.fingerprint
    assert not any("host" in k for k in module.state_dict())
    # rows of a batch are pairs: what the host says of the same samples one by one
    pairs = {}
    for b in data.val_dataloader():
        pairs |= {tuple(r.tolist()): t for r, t in zip(b.x["image"].mul(1e3).round(), b.x["text"], strict=True)}
    for row, text in zip(
        module.train_batches[0].x["image"].mul(1e3).round(), module.train_batches[0].x["text"], strict=True
    ):
        torch.testing.assert_close(text, pairs[tuple(row.tolist())], atol=1e-4, rtol=1e-3)


def test_token_sites(host, shards):
    sites = {"image": "visual.transformer.resblocks.0:out[patches]", "text": "transformer.resblocks.0:out[mask]"}
    data = make(shards, host, sites=sites, quotas={"image": 12, "text": 9}, buffer_pairs=60, epoch_batches=4)
    batches = list(data.train_dataloader())
    assert [(b.x["image"].shape, b.x["text"].shape) for b in batches] == [((12, 16), (9, 12))] * 4


def test_wrong_input(host, shards):
    with pytest.raises(InputError, match="buffer_pairs is 4"):
        make(shards, host, buffer_pairs=4)
    with pytest.raises(InputError, match=r"d_in is 7, but image activations .* have width 6"):
        make(shards, host, d_in=7).setup()
    with pytest.raises(InputError, match="epoch of 5 samples is less than one batch of 8"):
        make(shards, host, epoch_samples=5).train_dataloader()
    with pytest.raises(InputError, match="No shard matches"):
        make("none-*.tar", host).train_dataloader()


class TellAll(pl.Callback):
    """SIGTERM to every process of the job, as schedulers send it."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4:
            self.workers = multiprocessing.active_children()
            # by another process: what a worker's parent sends, it obeys
            subprocess.run(["kill", "-TERM", *(str(p.pid) for p in self.workers), str(os.getpid())], check=True)
            time.sleep(0.2)


@pytest.mark.filterwarnings("ignore")
def test_sigterm_to_the_workers_too_saves_the_step_and_leaves_no_worker(shards, host, tmp_path):
    tell = TellAll()
    trainer = pl.Trainer(
        max_steps=20, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[tell, RunCheckpoint(100)], default_root_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        trainer.fit(Seen(), datamodule=make(shards, host, workers=2))
    assert stop.value.code == 143 and (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert len(tell.workers) == 2 and not multiprocessing.active_children()


def test_other_ranks_keep_the_batches_of_the_stream(host, shards, tmp_path):
    """What a checkpoint says about the batches of all ranks is shared by those that go on, or refused."""
    sites = {"image": "visual.transformer.resblocks.0:out[patches]", "text": "transformer.resblocks.0:out[mask]"}
    tokens = {"sites": sites, "quotas": {"image": 12, "text": 8}, "buffer_pairs": 60, "epoch_batches": 4}
    asked = {"batch_size": 8, "quotas": None}, {"batch_size": 8, "quotas": tokens["quotas"]}
    pairs = make(shards, host)
    pairs.load_state_dict({"": {"world": 2, "rows": {"units": 16}, "asked": asked[0]}})
    loader = pairs.train_dataloader()
    assert len(loader) == 60 // 16 and {b.x["image"].shape[0] for b in loader} == {16}
    pairs = make(shards, host, batch_size=16)  # other options than those of the checkpoint are what is meant
    pairs.load_state_dict({"": {"world": 2, "rows": {"units": 16}, "asked": asked[0]}})
    assert pairs.size() == (16, None)
    tokens = make(shards, host, **tokens)
    tokens.load_state_dict({"": {"world": 4, "rows": {"units": 32, "image": 48, "text": 32}, "asked": asked[1]}})
    assert tokens.size() == (32, {"image": 48, "text": 32})
    with pytest.raises(InputError, match=r"batches of 32 units and 48 image and 32 text rows .* which 3 ranks cannot"):
        tokens.shares(3, asked[1])

import json

import lightning
import pytest
import torch
from jsonargparse import ArgumentParser

from datamodules.image_text import ImageTextDataModule
from mmsae.hosts import Encoder
from mmsae.shards import ShardWriter, Source
from mmsae.types import ImageTextBatch, InputError

PNG = bytes.fromhex(  # one red pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


def image(_):
    return torch.ones(3, 2, 2)


def words(captions):
    return torch.tensor([[1, int(c.split()[-1]), 2] for c in captions])


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "data", "train", per_shard=8) as writer:
        for i in range(40):
            writer.write(f"{i:04d}", {"png": PNG, "txt": f"number {i}"})
    return str(tmp_path / "data")


class Model(lightning.LightningModule):
    """Learns nothing; remembers what it saw and where it was asked to put it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, _):
        assert isinstance(batch, ImageTextBatch)
        self.seen.append(batch.keys)
        return self.weight * batch.images.mean()

    def validation_step(self, batch, _):
        self.validated += batch.uids

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path, **kw):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, num_sanity_val_steps=0, **kw
    )  # fmt: skip


def test_fit_with_explicit_callables_and_resume_in_the_middle_of_an_epoch(tmp_path, shards):
    def data():
        return ImageTextDataModule(
            train=shards, val=f"{shards}/train-00000{{0,1}}.tar", transform=image, tokenize=words, batch_size=4,
            workers=0, epoch_samples=24, shuffle=16
        )  # fmt: skip

    module, model = data(), Model()
    run = trainer(tmp_path, max_steps=8, enable_checkpointing=False)
    run.fit(model, module)
    assert len(model.seen) == 8 and all(len(keys) == 4 for keys in model.seen)
    assert len(set(model.validated)) == 16  # after the first epoch of 6 batches
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = Model()
    trainer(tmp_path, max_steps=14, enable_checkpointing=False).fit(
        again, data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True
    )
    assert len(again.seen) == 6 and len(again.validated) == 16  # it ends the second epoch and begins the third
    assert again.seen != model.seen[:6]


def test_the_host_gives_transform_and_tokenizer_and_nothing_is_loaded_before_setup(shards, monkeypatch):
    loaded = []

    @Encoder.register
    class Host:
        tokenize = staticmethod(words)

        def transform(self, train):
            return (lambda _: torch.zeros(3, 4, 4)) if train else image

    def load(name, **kw):
        loaded.append((name, kw))
        return Host()

    monkeypatch.setattr("datamodules.options.load_host", load)
    module = ImageTextDataModule(train=shards, val=shards, host="ViT-B-32", batch_size=8, workers=0, augment=True)
    assert module.d_in == 512 and module.modalities == ("image", "text") and module.sites == {} and not loaded
    train, val = module.train_dataloader(), module.val_dataloader()
    assert loaded == [("ViT-B-32", {"allow_random": False})]
    assert len(train) == 5  # as many samples as the shards hold
    assert next(iter(train)).images.shape == (8, 3, 4, 4)
    batches = list(val)
    assert batches[0].images.shape == (8, 3, 2, 2) and sum(len(b.uids) for b in batches) == 40
    assert torch.equal(batches[0].texts, words(batches[0].captions))
    train.close()


def test_a_real_host_through_worker_processes(shards, tmp_path):
    module = ImageTextDataModule(val=shards, host="timm:test_vit.r160_in1k", workers=2, allow_random=True)
    assert module.modalities == ("image",) and module.d_in > 0
    module.setup()
    batches = list(module.val_dataloader())
    assert sum(len(b.uids) for b in batches) == 40
    assert batches[0].texts is None and batches[0].images.shape[1:] == (3, 160, 160)


def test_what_is_missing_is_named(shards):
    with pytest.raises(InputError, match="needs a host"):
        ImageTextDataModule(train=shards)
    module = ImageTextDataModule(val=shards, transform=image)
    assert module.modalities == ("image",)
    with pytest.raises(InputError, match="no shards to train on"):
        module.train_dataloader()
    assert ImageTextDataModule(train=shards, transform=image).val_dataloader() == []


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        ("data/*.tar", "data/*.tar"),
        (["a.tar", "b.tar"], ["a.tar", "b.tar"]),
        ({"a.tar": 2.0, "b.tar": 1.0}, {"a.tar": 2.0, "b.tar": 1.0}),
        (
            [{"pattern": "a.tar", "weight": 0.5, "name": "a"}, {"pattern": ["b.tar", "c.tar"]}],
            [Source("a.tar", 0.5, "a"), Source(["b.tar", "c.tar"])],
        ),
    ],
)
def test_every_form_of_sources_is_read_from_yaml(tmp_path, given, sources):
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageTextDataModule, "data")
    parser.add_argument("--config", action="config")
    config = {"class_path": "datamodules.ImageTextDataModule", "init_args": {"train": given, "host": "ViT-B-32"}}
    (tmp_path / "c.json").write_text(json.dumps({"data": config}))
    module = parser.instantiate_classes(parser.parse_args([f"--config={tmp_path / 'c.json'}"])).data
    assert module.train == sources and type(module.train) is type(sources)

"""Gradients of a host's loss beside its activations, in stores and in streams."""

import json

import pytest
import torch

from datamodules import CachedActivations, StreamingActivations
from mmsae.activations import ActivationStore, StoreLoader, extract, write_store
from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.sae import SAE, AffineEncoder, Dictionary, GradientTopK, PerModalityEncoder
from mmsae.shards import Reader, ShardWriter, make_pipeline
from mmsae.training.lit import LitSAE
from mmsae.types import InputError
from tests.helpers.encoders import MODELS, WORDS, save_local
from tests.helpers.lit import trainer
from tests.helpers.lvlm import llava
from tests.helpers.stores import contents, image_bytes
from tests.helpers.training import ROOT, fit

QUIET = {"workers": 0, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP and two tars of twelve pairs with class numbers."""
    root = tmp_path_factory.mktemp("gradients")
    with ShardWriter(root / "shards", "s", per_shard=12) as w:
        for i in range(24):
            caption = f"a {WORDS[2 + i % 9]} {WORDS[5 + i % 4]}"
            w.write(
                f"k{i}", {"png": image_bytes(11 * i, 8), "txt": caption, "cls": i % 3, "json": {"question": caption}}
            )
    return save_local(root / "clip", MODELS["vit"]), str(root / "shards")


def by_hand(host, shards, batch_size, sites, gradient):
    """What the host gives, batch by batch of each tar."""
    held = load_host(host)
    reader = Reader.of(batch_size=batch_size, **held.reading(["image", "text"]))
    return [held.capture(b, sites, gradient) for b in make_pipeline(shards, reader, train=False)]


def test_a_store_holds_what_the_host_gives(world, tmp_path):
    host, shards = world
    sites = {"image": "visual.transformer.resblocks.1:out[patches]", "text": "text.embed"}
    options = {"sites": list(sites.values()), "batch_size": 6, **QUIET}
    plain = extract(host, shards, tmp_path / "plain", **options)
    out = extract(host, shards, tmp_path / "g", gradient="contrastive", **options)
    store, want = ActivationStore(out), by_hand(host, shards, 6, sites, "contrastive")
    for m in sites:
        rows = {m: torch.arange(store.spec.rows[m]).numpy()}
        tokens = store.tokens({m: m}, rows)
        torch.testing.assert_close(tokens.grad[m], torch.cat([t.grad[m] for t in want]))
        assert torch.equal(tokens.x[m], ActivationStore(plain).load(modality=m)) and tokens.grad[m].norm() > 0
    assert store.spec.job["gradient"] == "contrastive" and "gradient" not in ActivationStore(plain).spec.job
    assert store.spec.content_hash != ActivationStore(plain).spec.content_hash
    with pytest.raises(InputError, match="gradient"):
        extract(host, shards, out, gradient="", **options)
    half = ActivationStore(extract(host, shards, tmp_path / "bf", gradient="contrastive", dtype="bfloat16", **options))
    got = half.tokens({"text": "text"}, {"text": torch.arange(24).numpy()}).grad["text"]
    assert got.dtype == torch.float32 and torch.allclose(got, torch.cat([t.grad["text"] for t in want]), rtol=1e-2)


def test_images_alone_are_stored_with_the_loss_of_pairs(world, tmp_path):
    host, shards = world
    out = extract(host, shards, tmp_path / "g", sites="image.embed", gradient="contrastive", batch_size=12, **QUIET)
    grad = ActivationStore(out).tokens({"image": "image"}, {"image": torch.arange(24).numpy()}).grad["image"]
    want = by_hand(host, shards, 12, None, "contrastive")
    torch.testing.assert_close(grad, torch.cat([t.grad["image"] for t in want]))


def test_a_resumed_extraction_has_the_same_bytes(world, tmp_path):
    host, shards = world
    whole = extract(host, shards, tmp_path / "a", gradient="contrastive", batch_size=5, **QUIET)
    out = extract(host, shards, tmp_path / "b", gradient="contrastive", batch_size=5, **QUIET)
    (out / "spec.json").rename(out / "gone")
    spec = json.loads((out / "gone").read_text())
    (out / "gone").unlink()
    for kind in ("parquet", "safetensors"):
        (out / f"shard-00001.{kind}").unlink()
    identity = {n: {k: v for k, v in s.items() if k != "hint"} for n, s in spec["sites"].items()}
    job = {"sites": identity, "dtype": "float32", "units": 2, "job": spec["job"]}
    (out / "job.json").write_text(json.dumps(job))
    extract(host, shards, out, gradient="contrastive", batch_size=5, **QUIET)
    assert contents(whole) == contents(out)


def test_class_numbers_come_from_the_samples(world, tmp_path):
    _, shards = world
    with pytest.warns(UserWarning, match="random"):
        held = load_host("timm:test_vit", allow_random=True)
    out = extract(held, shards, tmp_path / "c", gradient="classifier", batch_size=12, **QUIET)
    tokens = ActivationStore(out).tokens({"image": "image"}, {"image": torch.arange(24).numpy()})
    weight, bias = held.classifier
    p = (tokens.x["image"] @ weight.T + bias).softmax(1)
    p[torch.arange(24), torch.arange(24) % 3] -= 1
    torch.testing.assert_close(tokens.grad["image"], p @ weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("items", [None, torch.arange(40) // 2])
def test_loaders_keep_gradients_with_their_rows(tmp_path, items):
    x = {"image": torch.randn(40, 3), "text": torch.randn(40, 4)}
    grad = {"image": 2 * x["image"]}
    both = None if items is None else {"image": items, "text": items}
    folder = write_store(tmp_path / "s", x, items=both, grad=grad, rows_per_shard=7)
    for shuffle in (True, False):
        for batch in StoreLoader(ActivationStore(folder), 8, shuffle=shuffle):
            assert set(batch.grad) == {"image"} and torch.equal(batch.grad["image"], 2 * batch.x["image"])
    data = CachedActivations(str(folder), 8)
    assert next(iter(data.train_dataloader())).grad is not None
    assert next(iter(StoreLoader(ActivationStore(write_store(tmp_path / "t", x, items=both)), 8))).grad is None


def test_streams_bring_gradients(world):
    host, shards = world
    options = {"batch_size": 4, "buffer_pairs": 12, "read_batch": 12, "workers": 0, "shuffle": 1}
    data = StreamingActivations(shards, host, val_shards=shards, gradient="contrastive", **options)
    want = by_hand(host, shards, 12, None, "contrastive")
    for got, true in zip(data.val_dataloader(), want, strict=True):
        torch.testing.assert_close(got.grad, true.grad)
    for batch in data.train_dataloader():
        assert {m: g.shape for m, g in batch.grad.items()} == {"image": (4, 16), "text": (4, 16)}
        assert all(g.norm(dim=1).min() > 0 for g in batch.grad.values())
    with pytest.raises(InputError, match="gradient is 'lm'"):
        StreamingActivations(shards, host, gradient="lm", **options).train_dataloader()


def test_a_vision_language_host(tmp_path, world):
    name = llava(tmp_path / "llava")
    out = extract(name, world[1], tmp_path / "s", gradient="lm", batch_size=6, **QUIET)
    store = ActivationStore(out)
    rows = {m: torch.arange(store.spec.rows[m]).numpy() for m in ("image", "text")}
    assert all(g.norm() > 0 for g in store.tokens({m: m for m in rows}, rows).grad.values())


def test_what_underflows_is_refused(world, tmp_path, capsys):
    host, shards = world
    x = {"image": torch.ones(4, 2)}
    with pytest.raises(InputError, match="gradients underflow in float16"):
        write_store(tmp_path / "s", x, grad=x, dtype="float16")
    with pytest.raises(InputError, match=r"gradients have shape \(4, 1\), activations \(4, 2\)"):
        write_store(tmp_path / "s", x, grad={"image": torch.ones(4, 1)})
    command = ["extract", "--host", host, "--shards", shards, "--out", str(tmp_path / "o"), "--workers", "0"]
    for odd in (["--dtype", "float16"], ["--precision", "fp16"]):
        with pytest.raises(SystemExit):
            main([*command, "--gradient", "contrastive", "--device", "cpu", *odd])
        assert "underflow" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_recipe_of_g_sae_trains_from_a_store(tmp_path):
    x = {"image": torch.randn(300, 16)}
    store = write_store(tmp_path / "s", x, grad={"image": torch.randn(300, 16)})
    recipe = str(ROOT / "configs" / "train" / "gradient_topk_store.yaml")
    done = fit(store, tmp_path / "run", "--trainer.max_steps", "20", recipe=recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    sae = SAE.from_pretrained(tmp_path / "run" / "sae")
    assert sae.selector.name == "gradient_topk" and 0 < sae.selector.sum_ and sae.selector.weight_ > 0
    without = fit(write_store(tmp_path / "t", x), tmp_path / "no", "--trainer.max_steps", "2", recipe=recipe)
    assert without.returncode == 2 and "needs gradients of the host's loss to train" in without.stderr


@pytest.mark.filterwarnings("ignore")
def test_g_sae_trains_and_validates_on_a_stream(world, tmp_path):
    host, shards = world
    options = {"batch_size": 8, "buffer_pairs": 16, "read_batch": 12, "workers": 0, "shuffle": 1, "epoch_batches": 4}
    sites = {"image": "visual.transformer.resblocks.1:out[patches]", "text": "transformer.resblocks.1:out[mask]"}
    data = StreamingActivations(shards, host, val_shards=shards, gradient="contrastive", sites=sites, **options)
    sae = SAE(
        selector=GradientTopK(4),
        dictionaries={m: Dictionary() for m in sites},
        encoder=PerModalityEncoder(AffineEncoder()),
        d_sae=48,
    )
    module, on = LitSAE(sae, normaliser_rows=64), trainer(tmp_path, 6, val_check_interval=2)
    on.fit(module, datamodule=data)
    assert (sae.selector.weight_ > 0).all() and "val/fvu/text" in on.callback_metrics

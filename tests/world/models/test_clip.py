import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mmsae.hosts import load_host
from mmsae.options import call
from mmsae.types import InputError
from mmsae.world.generator.shards import write_world
from mmsae.world.measure.host import embed_images, embed_texts, recall_at_1, zero_shot_attributes
from mmsae.world.models import contrastive, loop
from mmsae.world.models.command import pretrain_clip
from mmsae.world.models.tokenizer import LONGEST, words_of

SMALL = dict(steps=20, batch_size=16, embed_dim=16, text_width=32, text_layers=1, progress=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_world(folder, 96, seed=5, progress=False)
    return str(folder / "world-{000000..000000}.tar")


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "model"
    return out, call(pretrain_clip, shards=shards, out=str(out), **SMALL)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "open_clip_model.safetensors")


def test_the_folder_is_an_open_clip_model_with_the_same_embeddings(trained, shards):
    out, stats = trained
    name = f"local-dir:{out}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    x = preprocess(image)
    assert torch.allclose(x, (torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-6)
    texts = ["a large red circle on the left on a dark background", "a shape", " ".join(["a"] * 60)]
    ids = tokenizer(texts)
    eos = int(ids.max())
    assert eos == stats["words"] + 2 != 2 and (ids == eos).sum(1).tolist() == [1, 1, 1]
    host = load_host(name)
    with torch.no_grad():
        assert torch.allclose(host.encode_image(x[None]), model.encode_image(x[None]), atol=1e-5)
        assert torch.allclose(embed_texts(host, texts), model.encode_text(ids), atol=1e-5)
    assert embed_images(host, np.asarray(image)[None]).shape == (1, 16)


def test_training_report(trained):
    out, stats = trained
    saved = json.loads((out / "training.json").read_text())
    curve = saved.pop("curve")
    assert stats == saved
    assert stats["steps"] == 20 and stats["images"] == 96 and stats["too_long"] == 0
    assert stats["recipe"]["photo"] is False, "captions speak of left and right"
    assert curve == [[20, stats["loss"]]] and np.isfinite(stats["loss"])
    assert sorted(p.name for p in out.parent.iterdir()) == ["model"], "no state file, no temporary folder"


def test_it_learns(shards, tmp_path):
    first, last = (
        call(pretrain_clip, shards=shards, out=str(tmp_path / str(n)), **SMALL | {"steps": n})["loss"] for n in (1, 60)
    )
    assert first > 2.5 and last < first - 0.7


def test_same_seed_same_weights_and_the_global_generator_is_left_alone(shards, trained, tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    call(pretrain_clip, shards=shards, out=str(tmp_path / "again"), **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    call(pretrain_clip, shards=shards, out=str(tmp_path / "other"), **SMALL, seed=1)
    a, b, c = weights(trained[0]), weights(tmp_path / "again"), weights(tmp_path / "other")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["visual.head.proj.weight"], c["visual.head.proj.weight"])


def test_a_killed_run_goes_on_to_the_same_weights(shards, trained, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "model", contrastive.pair_loss, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(contrastive, "pair_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        call(pretrain_clip, shards=shards, out=str(out), **SMALL, checkpoint_every=5)
    assert not out.exists() and (tmp_path / "model.partial").exists()
    monkeypatch.setattr(contrastive, "pair_loss", real)
    # checkpoint_every is no part of what makes a run the same run
    stats = call(pretrain_clip, shards=shards, out=str(out), **SMALL, checkpoint_every=7)
    assert stats["first_step"] == 10
    a, b = weights(trained[0]), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_state_of_another_run_is_not_used(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "schedule", lambda step, steps: 1 / 0 if step == 6 else 1.0)
    with pytest.raises(ZeroDivisionError):
        call(pretrain_clip, shards=shards, out=str(tmp_path / "model"), **SMALL, checkpoint_every=5)
    monkeypatch.undo()
    stats = call(pretrain_clip, shards=shards, out=str(tmp_path / "model"), **SMALL | {"lr": 0.01, "progress": True})
    assert stats["first_step"] == 0 and "of another run" in capsys.readouterr().out


def test_a_used_folder_is_refused_unless_overwritten(shards, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        call(pretrain_clip, shards=shards, out=str(out), **SMALL)
    assert (out / "notes.txt").read_text() == "mine"
    call(pretrain_clip, shards=shards, out=str(out), **SMALL | {"steps": 1}, overwrite=True)
    assert (out / "open_clip_config.json").exists() and not (out / "notes.txt").exists()


def test_bad_arguments_are_named(shards, tmp_path):
    for change, words in (
        ({"image_tower": "no_such_net"}, "no_such_net"),
        ({"steps": 0}, "steps 0"),
        ({"text_width": 50}, "text_width 50"),
    ):
        with pytest.raises(InputError, match=words):
            call(pretrain_clip, shards=shards, out=str(tmp_path / "x"), **SMALL | change)
    with pytest.raises(InputError):
        call(pretrain_clip, shards=str(tmp_path / "none-*.tar"), out=str(tmp_path / "x"), **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive, "pair_loss", lambda *a: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(FloatingPointError, match="step 0"):
        call(pretrain_clip, shards=shards, out=str(tmp_path / "x"), **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_larger_photographs_and_long_captions(tmp_path):
    import io

    from mmsae.shards import ShardWriter

    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "s", "p") as w:
        for i in range(6):
            jpg = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(jpg, "JPEG")
            w.write(f"{i}", {"jpg": jpg.getvalue(), "txt": f"Photo number {i}: " + "word " * 50})
    stats = call(
        pretrain_clip, shards=str(tmp_path / "s"), out=str(tmp_path / "m"), **SMALL | {"steps": 2}, image_size=48
    )
    assert stats["recipe"]["photo"] and stats["recipe"]["batch_size"] == 6 and stats["too_long"] == 6
    config = json.loads((tmp_path / "m" / "open_clip_config.json").read_text())["model_cfg"]
    assert config["text_cfg"]["context_length"] == LONGEST and config["vision_cfg"]["image_size"] == 48
    host = load_host(f"local-dir:{tmp_path / 'm'}")
    assert len(words_of("Photo number 1: word")) == 5
    assert embed_images(host, rng.integers(0, 256, (2, 30, 60, 3), dtype=np.uint8)).shape == (2, 16)


def test_an_untrained_host_is_near_chance(trained):
    from mmsae.world.generator.data import generate

    host, data = load_host(f"local-dir:{trained[0]}"), generate(200, 9)
    image, text = embed_images(host, data.images), embed_texts(host, data.full[:100])
    zero_shot = zero_shot_attributes(image, data.scenes, lambda t: embed_texts(host, t))
    assert set(zero_shot) >= {"colour", "shape", "size", "texture", "background", "position"}
    recall = recall_at_1(image[:100], text, data.full[:100])
    assert set(recall) == {"image_to_text", "text_to_image"}
    assert zero_shot["colour_shape"] < 0.5 and recall["image_to_text"] < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu_gives_a_model_that_loads_on_the_cpu(shards, tmp_path):
    stats = call(
        pretrain_clip,
        shards=shards,
        out=str(tmp_path / "m"),
        **SMALL | {"steps": 60},
        device="cuda",
        checkpoint_every=50,
    )
    assert (
        stats["loss"] < 3
        and load_host(f"local-dir:{tmp_path / 'm'}").encode_text(torch.ones(1, 17).long()).isfinite().all()
    )

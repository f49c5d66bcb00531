"""The tiny LLaVA: trained, saved, loaded, gone on with."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mmsae.hosts import load_host
from mmsae.options import call
from mmsae.types import InputError
from mmsae.world.generator.data import generate
from mmsae.world.models.clip import build_clip, clip_config, save_clip
from mmsae.world.models.llava import model as llava
from mmsae.world.models.llava.model import train_llava
from mmsae.world.models.llava.questions import pil_images
from mmsae.world.models.options import Texts
from mmsae.world.models.tokenizer import Words

SMALL = {"hidden": 32, "layers": 2, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An untrained CLIP folder."""
    folder = tmp_path_factory.mktemp("clip")
    config = clip_config(16, 32, "test_resnet", Words(["word"] * 37, 16, 0), Texts(text_width=32, text_layers=1))
    save_clip(folder, build_clip(config, 0), config)
    return str(folder)


@pytest.fixture(scope="module")
def trained(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("llava") / "out"
    return call(train_llava, data=200, clip=clip, out=str(out), steps=30, **SMALL), out


def test_learns_and_says_what_it_did(trained):
    stats, out = trained
    curve = json.loads((out / "training.json").read_text())["curve"]
    assert curve[-1][1] < 0.9 * curve[0][1] and stats["steps"] == 30 and stats["first_step"] == 0
    assert not out.with_name("out.partial").exists()


def test_loads_in_a_fresh_process_and_answers(trained):
    code = "import sys; from mmsae.hosts import load_host; print(load_host(sys.argv[1]).fingerprint)"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, f"lvlm:{trained[1]}"], capture_output=True, text=True, env=env, check=True
    )
    host = load_host(f"lvlm:{trained[1]}")
    assert run.stdout.strip() == host.fingerprint
    data = generate(6, 9)
    images = pil_images(data.images)
    said = host.answer(host.collate.batch(["is there a red circle?"] * 6, images), max_new_tokens=24)
    assert len(said) == 6 and all(set(a.split()) <= set(host.processor.tokenizer.get_vocab()) for a in said)
    batch = host.collate.batch(["describe the image."], images[:1])
    assert host.prompt("q") == "USER: <image>\nq ASSISTANT:"
    assert host.grid(batch)[0].layout.grids[0].shape == (4, 4)


def test_tower_is_the_clips_own_trunk_and_stays_so(trained, clip):
    host = load_host(f"lvlm:{trained[1]}")
    tower = host.model.model.vision_tower
    want = {k.removeprefix("visual.trunk."): v for k, v in load_file(f"{clip}/open_clip_model.safetensors").items()}
    for name, value in tower.trunk.state_dict().items():
        assert torch.equal(value, want[name]), name
    pixels = host.collate.batch(["q"] * 50, pil_images(generate(200, 1).images[:50])).inputs["pixel_values"]
    maps = load_host(f"local-dir:{clip}").model.visual.trunk.forward_intermediates(pixels, intermediates_only=True)
    x = tower(pixels).last_hidden_state
    first = (x / tower.scale + tower.mean)[..., :48]
    assert torch.allclose(first, maps[2].flatten(2).transpose(1, 2), atol=1e-4)
    assert x.mean().abs() < 0.1 and abs(x.std() - 1) < 0.2


def test_a_killed_run_goes_on_to_the_same_model(trained, clip, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    class Dying(llava.Dialogues):
        def __call__(self, step):
            if step == 23:
                raise Killed
            return super().__call__(step)

    monkeypatch.setattr(llava, "Dialogues", Dying)
    with pytest.raises(Killed):
        call(train_llava, data=200, clip=clip, out=str(tmp_path / "out"), steps=30, checkpoint_every=10, **SMALL)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    stats = call(train_llava, data=200, clip=clip, out=str(tmp_path / "out"), steps=30, checkpoint_every=10, **SMALL)
    assert stats["first_step"] == 20
    one, two = (load_file(f / "model.safetensors") for f in (trained[1], tmp_path / "out"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def test_goes_on_from_a_base(trained, tmp_path):
    stats = call(
        train_llava, data=100, clip="", out=str(tmp_path / "out"), steps=5, base=str(trained[1]), data_seed=4, **SMALL
    )
    one, two = (load_file(f / "model.safetensors") for f in (trained[1], tmp_path / "out"))
    frozen = [k for k in one if "vision_tower" in k]
    assert all(torch.equal(one[k], two[k]) for k in frozen)
    assert stats["loss"] < trained[0]["loss"] + 1 and any(not torch.equal(one[k], two[k]) for k in one)


def test_bad_input(trained, clip, tmp_path):
    with pytest.raises(InputError, match="not empty"):
        call(train_llava, data=20, clip=clip, out=str(trained[1]), steps=1, progress=False)
    with pytest.raises(InputError, match="no open_clip folder"):
        call(train_llava, data=20, clip=str(tmp_path), out=str(tmp_path / "out"), steps=1, progress=False)
    with pytest.raises(InputError, match="steps 0"):
        call(train_llava, data=20, clip=clip, out=str(tmp_path / "out"), steps=0, progress=False)
    assert not (tmp_path / "out").exists()

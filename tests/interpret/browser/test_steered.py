import json

import pytest
import torch

from mmsae.interpret.browser.steered import write_strips
from mmsae.steering.job import _save_images
from mmsae.steering.measure.sweep import UNSTEERED, Item
from mmsae.types import InputError
from tests.helpers.browser import read

SAE = "s" * 32


@pytest.fixture
def run(tmp_path):
    """What mmsae steer leaves of two prompts, two strengths and a control."""
    folder = tmp_path / "steer"
    (folder / "parts").mkdir(parents=True)
    items = [Item("a dog", 5), Item("a cat", 9)]
    shade = {
        (UNSTEERED, 0.0, -1): 0.0, ("#3", 2.0, -1): 0.5, ("#3", 1.0, -1): 0.25, ("#3", 2.0, 0): 1.0, ("#3", 2.0, 1): 0.1
    }  # fmt: skip
    images = {k: {i: torch.full((3, 8, 8), v) for i in items} for k, v in shade.items()}
    _save_images(images, folder / "parts" / "0.safetensors")
    job = {"sae": SAE, "prompts": ["a dog", "a cat"], "how": {"features": [3, 7]}, "gates": {"unit": "x_max"}}
    (folder / "results.json").write_text(json.dumps({"name": "#3", "job": job}))
    return folder


def test_strips_by_strength_beside_the_first_control(run, tmp_path):
    assert write_strips(tmp_path / "data", [str(run)], SAE) == {3: ["strips/0"], 7: ["strips/0"]}
    strip = read(tmp_path, "strips/0")
    assert strip["strengths"] == [0, 1, 2] and strip["unit"] == "x_max"
    rows = [(r["prompt"], r["control"]) for r in strip["rows"]]
    assert rows == [("a dog", False), ("a dog", True), ("a cat", False), ("a cat", True)]
    own, control = strip["rows"][:2]
    assert all(x.startswith("data:image/webp") for x in own["images"]) and len(set(own["images"])) == 3
    assert control["images"][0] == own["images"][0] and control["images"][1] == "" and control["images"][2]


def test_runs_that_show_nothing_of_a_latent(run, tmp_path):
    with pytest.raises(InputError, match="steers with SAE ssssssssssss, and the evidence is of tttttttttttt"):
        write_strips(tmp_path / "data", [str(run)], "t" * 32)
    with pytest.raises(InputError, match=r"no run of mmsae steer: it has no results\.json"):
        write_strips(tmp_path / "data", [str(tmp_path)], SAE)
    said = json.loads((run / "results.json").read_text())
    said["job"]["how"]["features"] = []
    (run / "results.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="steers no features of its own"):
        write_strips(tmp_path / "data", [str(run)], SAE)

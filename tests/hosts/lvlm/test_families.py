"""Families of vision-language models: image tokens lie where the grid says, and what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmsae.hosts import load_host
from mmsae.hosts.lvlm.families import frame
from mmsae.hosts.lvlm.tokens import PATCH
from mmsae.types import InputError
from tests.helpers import lvlm as made

KINDS = ["llava", "qwen2", "qwen", "qwen3", "gemma", "internvl", "idefics", "smolvlm"]
MIXING = ("self_attn.out_proj", "attn.proj", "attention.projection_layer")  # by which patches see each other


def without_attention(host):
    """A host whose vision tower treats every patch for itself."""
    found = 0
    for name, module in host.model.named_modules():
        if "vis" in name and name.endswith(MIXING):
            module.weight.data.zero_()
            module.bias.data.zero_()
            found += 1
    assert found == 2  # layers
    return host


def shown(host, pixels):
    """What the language model is given for the image, ``(tokens, d)``."""
    batch = host.collate.batch(["what"], [Image.fromarray(pixels)])
    return host.capture(batch, "layers.0:in").x["image"], host.grid(batch)[0].layout


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_in_the_image_is_at_its_cell_of_the_grid(kind, tmp_path):
    host = without_attention(load_host(getattr(made, kind)(tmp_path / kind)))
    side = 24 if kind == "llava" else 32
    plain = np.random.default_rng(0).integers(60, 200, (side, side, 3), dtype=np.uint8)
    clean, layout = shown(host, plain)
    (grid,) = layout.grids
    rows, cols = grid.shape
    assert rows == cols == {"llava": 3, "qwen2": 4, "qwen": 4, "qwen3": 4}.get(kind, 2) and layout.length == rows * cols
    step = side // rows
    for r in range(rows):
        for c in range(cols):
            pixels = plain.copy()
            inside = slice(step * r + step // 3, step * r + step - step // 3)
            pixels[inside, step * c + step // 3 : step * c + step - step // 3] = 255  # interpolation stays in the cell
            moved = (shown(host, pixels)[0] - clean).abs().amax(1)
            assert moved.argmax() == grid[r, c] and moved[grid[r, c]] > 50 * moved.sort()[0][-2]


@pytest.mark.parametrize("kind", ["gemma", "internvl", "idefics"])
def test_crops_and_tiles_are_turned_off(kind, tmp_path):
    host = load_host(getattr(made, kind)(tmp_path / kind))
    images = host.processor.image_processor
    images.do_pan_and_scan = images.crop_to_patches = images.do_image_splitting = True
    batch = host.collate.batch(["what"], [made.picture(0, (96, 32))])
    assert (batch.inputs["kinds"] >= PATCH).sum() == 4 and len(host.grid(batch)) == 1


def test_a_prompt_holds_the_familys_placeholder(tmp_path):
    for kind, mark in (("gemma", "<start_of_image>"), ("internvl", "<image>"), ("idefics", "<image>")):
        host = load_host(getattr(made, kind)(tmp_path / kind))
        host.processor.chat_template = None
        host.collate = host.collator()
        assert host.prompt("what") == f"USER: {mark}\nwhat ASSISTANT:"
        assert frame(host.processor, "").tokens == 4
        batch = host.collate.batch(["is there a red circle?"], [made.picture(0)], ["yes"])
        words = host.processor.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0])
        assert words.count("<image>") == 4 and words[-2:] == ["yes", "</s>"]


@pytest.mark.parametrize(
    ("kind", "field"), [("gemma", "image_seq_length"), ("internvl", "image_seq_length"), ("idefics", "image_seq_len")]
)
def test_another_number_of_image_tokens_is_refused(kind, field, tmp_path):
    name = getattr(made, kind)(tmp_path / "h")
    path = tmp_path / "h" / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 9}))
    with pytest.raises(InputError, match=r"image tokens of an image is 9 in processor_config.json .*, but 4 in"):
        load_host(name)


def test_images_of_another_size_are_refused(tmp_path):
    name = made.gemma(tmp_path / "h")
    path = tmp_path / "h" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"] = {"height": 48, "width": 48}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"size is 48 in processor_config.json .*, but 32 in the model"):
        load_host(name)


def test_states_of_the_tower_come_behind_qwen3s_first_layers(tmp_path):
    host = load_host(made.qwen3(tmp_path / "h"))
    batch = host.collate.batch(["what"], [made.picture(0)])
    after, before = host.read(batch, ["layers.0:out[all]", "layers.1:in[all]"])
    moved = (after.x - before.x).abs().amax(1) > 1e-4
    assert torch.equal(moved, batch.inputs["kinds"][0] >= PATCH)
    assert torch.equal(*(r.x for r in host.read(batch, ["layers.1:out[all]", "layers.2:in[all]"])))


def test_gemmas_conversations_are_not_packed(tmp_path):
    host = load_host(made.gemma(tmp_path / "h"))
    with pytest.raises(InputError, match="cannot pack conversations: tokens of an image see each other both ways"):
        host.packer(host.collate, separate=False)


def test_a_package_that_a_processor_needs_is_named(tmp_path, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    name = made.smolvlm(tmp_path / "h")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(InputError, match=r"cannot be loaded: .*num2words"):
        load_host(name)

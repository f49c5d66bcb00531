"""Activations of generations as training data: what is drawn, what is held out, and a recipe that runs."""

import json
from pathlib import Path

import pytest
import torch

from datamodules import GenerationDataModule
from mmsae.activations.generated import PromptLoader, read_prompts, split_prompts
from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.sae import SAE
from mmsae.shards import ShardWriter
from mmsae.types import InputError
from tests.helpers.diffusion import WORDS, sd

RECIPE = Path(__file__).parents[2] / "configs" / "train" / "world_unet_update.yaml"
SITE = "unet.up_blocks.0.attentions.0:update"
PROMPTS = [f"a {a} {b}" for a in ("red", "blue", "green", "large", "small") for b in ("circle", "square", "cat", "dog")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A host's name and a file of prompts."""
    root = tmp_path_factory.mktemp("generation")
    sd().save_pretrained(root / "host", safe_serialization=True)
    (root / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]) + "\n")
    return f"diffusers:{root / 'host'}", str(root / "prompts.txt")


def module(world, **more):
    host, prompts = world
    options = {"steps": 4, "sample_steps": 2, "positions": 3, "batch_size": 16, "buffer_rows": 64, "read_batch": 4}
    return GenerationDataModule(prompts, host, **{"sites": {"image": SITE}, "epoch_batches": 3, **options, **more})


def test_prompts_come_from_a_file_or_from_captions(world, tmp_path):
    assert read_prompts(world[1]) == PROMPTS and read_prompts(world[1], limit=3) == PROMPTS[:3]
    with ShardWriter(tmp_path / "shards", "s", per_shard=3) as w:
        for i in range(7):
            w.write(f"k{i}", {"jpg": b"no picture at all", "txt": " ".join(WORDS[: 1 + i % 5])})
    assert sorted(read_prompts(str(tmp_path / "shards")), key=len) == [" ".join(WORDS[: 1 + i]) for i in range(5)]
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "one.txt").write_text("a\na\n")
    with pytest.raises(InputError, match="holds 1 different prompts"):
        read_prompts(str(tmp_path / "one.txt"))


def test_the_split_is_by_prompt_and_always_the_same():
    train, val = split_prompts(PROMPTS, 0.25)
    assert len(val) == 5 and not set(train) & set(val) and set(train) | set(val) == set(PROMPTS)
    assert set(split_prompts(PROMPTS[::-1], 0.25)[1]) == set(val) and set(split_prompts(PROMPTS, 0.5)[1]) > set(val)
    assert split_prompts(PROMPTS, 0.0)[1] == [] and len(split_prompts(PROMPTS, 0.001)[1]) == 1


def test_every_pass_draws_every_prompt_with_new_noise():
    loader, twice = iter(PromptLoader(PROMPTS, 10, seed=1)), []
    for _ in range(2):
        batches = [next(loader) for _ in range(2)]
        assert sorted(c for b in batches for c in b.captions) == sorted(PROMPTS)
        twice.append([(c, u) for b in batches for c, u in zip(b.captions, b.uids, strict=True)])
    assert [c for c, _ in twice[0]] != [c for c, _ in twice[1]] and not set(twice[0]) & set(twice[1])
    resumed = PromptLoader(PROMPTS, 10, seed=1)
    resumed.load_state_dict({"batch": 3})
    assert [(c, u) for b in [next(iter(resumed))] for c, u in zip(b.captions, b.uids, strict=True)] == twice[1][10:]
    ranks = [next(iter(PromptLoader(PROMPTS, 10, 1, r, 2))).captions for r in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(PROMPTS)


def test_training_batches_are_rows_of_training_prompts(world):
    data = module(world, val_fraction=0.25)
    assert data.d_in == 32 and data.modalities == ("image",) and data.sites["image"].io == "update"
    batches = list(data.train_dataloader())
    assert [b.x["image"].shape for b in batches] == [(16, 32)] * 3
    held, drawn = set(data.split[1]), []
    stream = data.loaded_host.stream_each
    data.loaded_host.stream_each = lambda prompts, *a, **kw: (drawn.extend(prompts), stream(prompts, *a, **kw))[1]
    list(data.train_dataloader())
    assert drawn and not set(drawn) & held
    drawn.clear()
    first, again = (list(data.val_dataloader()) for _ in range(2))
    assert set(drawn) == held and len(drawn) == 10
    assert all(torch.equal(a.x["image"], b.x["image"]) for a, b in zip(first, again, strict=True))
    assert sum(len(t.x["image"]) for t in first) == 5 * 2 * 3  # prompts, steps, positions


def test_several_sites_of_the_same_images(world):
    """Each gets what it would get for itself, steps and positions too, and the images are drawn once."""
    choices = {"up": {"image": SITE}, "mid": {"image": "unet.mid_block.attentions.0:out"}}
    choices["both"] = {"image": SITE, "text": "text_encoder.layers.1:out[content]"}
    data, drawn = module(world, val_fraction=0.25), []
    data.read_at(choices)
    assert data.at("mid").d_in == data.at("mid").sites["image"].width and data.at("up").loaded_host is data.loaded_host
    hook = data.loaded_host.model["unet"].register_forward_hook(lambda *_: drawn.append(1))
    found = list(data.val_dataloader())
    together = len(drawn)
    for name, sites in choices.items():
        drawn.clear()
        alone = list(module(world, val_fraction=0.25, sites=sites).val_dataloader())
        for a, b in zip(found, alone, strict=True):
            assert all(torch.equal(a.of[name].x[m], x) for m, x in b.x.items()), name
    data.read_at({name: choices[name] for name in ("up", "mid")})
    alone = list(module(world, val_fraction=0.25).train_dataloader())
    for a, b in zip(data.train_dataloader(), alone, strict=True):
        assert torch.equal(a.of["up"].x["image"], b.x["image"]) and len(a.of["mid"].x["image"]) == 16
    hook.remove()
    assert 0 < together <= 4 * len(found)


def test_rows_are_what_the_pipeline_computes(world):
    host, seen = load_host(world[0]), []
    (tokens,) = host.stream(PROMPTS[:3], SITE, steps=4, sample_steps=[1, 2], seed=[7, 8, 9])

    def look(rows, where):
        if where.step in (1, 2):
            seen.append(rows[where.branch == 1])
        return rows

    with host.edit(SITE, look, where=True):
        host.generate(PROMPTS[:3], steps=4, seed=[7, 8, 9])
    assert torch.equal(tokens.x["image"], torch.cat(seen)) and tokens.uids == ["0", "1", "2"]
    assert tokens.item["image"].bincount().tolist() == [32, 32, 32] and tokens.position["image"].max() == 15
    both = list(host.stream(PROMPTS[:3], SITE, steps=2, branch="all", batch_size=2))
    assert [len(t.x["image"]) for t in both] == [2 * 2 * 2 * 16, 2 * 2 * 16] and both[1].uids == ["2"]
    text = {"image": SITE, "text": "text_encoder.layers.1:out[content]"}
    (tokens,) = host.stream(PROMPTS[:3], text, steps=1, positions=5)
    assert {m: len(x) for m, x in tokens.x.items()} == {"image": 15, "text": 9}
    assert len(next(host.stream(PROMPTS, text["text"])).x["text"]) == 3 * 8  # and nothing is drawn


def test_a_generation_ends_after_the_last_step_that_is_read(world):
    host, calls = load_host(world[0]), []
    hook = host.model["unet"].register_forward_hook(lambda *_: calls.append(1))
    list(host.stream(PROMPTS[:2], SITE, steps=8, sample_steps=[0, 2]))
    hook.remove()
    assert len(calls) == 3 + 2  # and the two passes in which the site is looked at
    with pytest.raises(InputError, match="steps 0 to 3"):
        list(host.stream(PROMPTS[:2], SITE, steps=4, sample_steps=[4]))
    with pytest.raises(InputError, match="branch 'uncond' does not run at guidance 0"):
        list(host.stream(PROMPTS[:2], SITE, steps=4, guidance=0, branch="uncond"))
    with pytest.raises(InputError, match="one site per modality"):
        list(host.stream(PROMPTS[:2], [SITE, "unet.mid_block.attentions.0:out"], steps=4))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"d_in": 31}, "d_in is 31, but image activations .* have width 32"),
        ({"sites": {"text": SITE}, "d_in": 32}, "given as text, but it is a site of modality image"),
        ({"val_fraction": 1.0}, "val_fraction is 1"),
        ({"buffer_rows": 8}, "buffer_rows is 8"),
    ],
)
def test_bad_input(world, more, why):
    with pytest.raises(InputError, match=why):
        module(world, **more).setup()
    with pytest.raises(InputError, match="draws nothing"):
        GenerationDataModule("p.txt", "timm:x", {"image": SITE})


def test_the_recipe_trains_an_sae(world, tmp_path):
    small = {"data.d_in": 32, "data.steps": 4, "data.sample_steps": 2, "data.read_batch": 4, "data.batch_size": 32,
             "data.buffer_rows": 512, "data.val_prompts": 2, "model.sae.init_args.d_sae": 64, "trainer.max_steps": 20,
             "trainer.val_check_interval": 20, "model.normaliser_rows": 128, "data.host": world[0],
             "data.prompts": world[1], "trainer.default_root_dir": tmp_path}  # fmt: skip
    main(["fit", "-c", str(RECIPE), *(a for k, v in small.items() for a in (f"--{k}", str(v)))])
    sae = SAE.from_pretrained(tmp_path / "sae")
    assert sae.sites["image"].io == "update" and sae.sites["image"].hint == world[0]
    report = json.loads((tmp_path / "sae" / "cfg.json").read_text())["mmsae"]["training"]
    assert 0 < report["validation"]["val/fvu/image"] < 1
    sae.attach(load_host(world[0]))

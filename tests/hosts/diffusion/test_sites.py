"""Sites of pipelines, what text tokens are, what a pipeline consumes, saving and loading."""

import json
import warnings

import pytest
import torch

import mmsae.hosts.diffusion.call as calls
from mmsae.activations import ActivationStore, extract
from mmsae.hosts import DiffusionHost, load_host, parse, site_width
from mmsae.hosts.diffusion.prompts import text_marks
from mmsae.info import describe
from mmsae.shards import ShardWriter
from mmsae.types import ImageTextBatch, InputError
from tests.helpers.diffusion import MAKE, WORDS, clip_text, tokenizer

PROMPTS = ["a red circle", "large blue square on white background"]
BLOCK = "unet.up_blocks.0.attentions.1"


@pytest.fixture(scope="module")
def folder(hosts, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "sd"
    hosts("sd").pipeline.save_pretrained(path, safe_serialization=True)
    return path


@pytest.mark.parametrize(
    ("kind", "spec", "module", "width"),
    [
        ("sd", "text_encoder.layers.1:out[content]", "text_encoder.encoder.layers.1", 32),
        ("sd", "text_encoder.text_model.encoder.layers.1:out[eos]", "text_encoder.encoder.layers.1", 32),
        ("sd", "text_encoder.final_layer_norm:out[mask]", "text_encoder.final_layer_norm", 32),
        ("sdxl", "text_encoder_2.layers.2:out[pad]", "text_encoder_2.text_model.encoder.layers.2", 48),
        ("sdxl", "text_encoder_2.encoder.layers.2:in[all]", "text_encoder_2.text_model.encoder.layers.2", 48),
        ("sdxl", "text_encoder_2.text_projection:out", "text_encoder_2.text_projection", 20),
        ("flux", "text_encoder_2.layers.1:out[content]", "text_encoder_2.encoder.block.1", 24),
        ("flux", "transformer.transformer_blocks.0:update", "transformer.transformer_blocks.0", 32),
        ("sd3", "transformer.transformer_blocks.1:out", "transformer.transformer_blocks.1", 32),
        ("sd", f"{BLOCK}:update[all]", BLOCK, 32),
        ("sd", f"{BLOCK}.transformer_blocks.0.attn2:out", f"{BLOCK}.transformer_blocks.0.attn2", 32),
        ("sd", "unet.down_blocks.1:out", "unet.down_blocks.1", 32),
    ],
)
def test_specs(hosts, kind, spec, module, width):
    site = hosts(kind).site(spec)
    assert (site.module, site.width) == (module, width)
    assert site.modality == ("text" if module.startswith("text") else "image")
    assert site.io == spec.partition(":")[2].partition("[")[0] and hosts(kind).site(site) == site


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("unet.up_blocks.7:out", "has no module or endpoint"),
        ("unet.mid_block.attentions.0:out[eos]", "is for text"),
        ("unet.mid_block.attentions.0:out[cls]", "needs a class token"),
        ("text_encoder.layers.1:out[patches]", "is for images"),
        ("unet.mid_block.attentions.0:sideways", "io 'sideways' is not one of"),
        ("unet.down_blocks.0.resnets.0.conv1:update", "cannot be a site with io 'update'|no set"),
        ("unet.conv_in:update", "its input has shape"),
        ("vae.decoder:out", "has no module or endpoint"),
    ],
)
def test_specs_that_mean_nothing(hosts, spec, why):
    with pytest.raises(InputError, match=why):
        site = hosts("sd").site(spec)
        raise InputError(f"no set of features is refused: {site}")


def test_an_update_is_another_site_than_the_output(hosts):
    update, out = (hosts("sd").site(f"{BLOCK}:{io}") for io in ("update", "out"))
    assert not update.same(out) and update.width == out.width
    other = DiffusionHost(MAKE["sd"](seed=1))
    with pytest.raises(InputError, match="belongs to host"):
        other.site(update)
    assert other.site(update, allow_other_site=True).host == other.fingerprint


@pytest.mark.parametrize("pad", ["<eos>", "!", "<pad>"])
def test_what_text_tokens_are(pad):
    t = tokenizer(pad=pad)
    ids = t(["a red circle", ""], padding="max_length", max_length=12, return_tensors="pt").input_ids
    marks = text_marks(torch.zeros(2, 12, 4), ids, t)
    assert marks.eos.tolist() == [4, 1] and marks.content.sum(1).tolist() == [5, 2]
    assert (marks.content & ~marks.special).sum(1).tolist() == [3, 0]
    assert marks.special[0].nonzero()[:, 0].tolist() == [0, *range(4, 12)]


def test_policies_share_out_the_tokens(hosts):
    host, rows = hosts("sdxl"), {}
    got = []
    for policy in ("content", "eos", "pad", "mask", "all"):
        got.clear()
        with host.edit(f"text_encoder_2.layers.1:out[{policy}]", lambda r, w: (got.append(w), r)[1], where=True):
            host.generate(PROMPTS, steps=1, height=16, width=16)
        rows[policy] = [got[0].position[got[0].item == i].tolist() for i in (0, 1)]
    assert rows["content"] == [[1, 2, 3], [1, 2, 3, 4, 5, 6]] and rows["eos"] == [[4], [7]]
    assert rows["pad"] == [list(range(5, 12)), list(range(8, 12))] and rows["mask"][0] == list(range(5))
    assert rows["all"] == [list(range(12))] * 2


@pytest.mark.parametrize(
    ("kind", "site", "options", "want"),
    [
        ("sd", "text_encoder.layers.2:out", {}, (True, False)),
        ("sd", "text_encoder.layers.1:out", {"clip_skip": 1}, (True, False)),
        ("sd", "text_encoder.layers.2:out", {"clip_skip": 1}, (False, False)),
        ("sdxl", "text_encoder.layers.1:out", {}, (True, False)),
        ("sdxl", "text_encoder.layers.2:out", {}, (False, False)),
        ("sdxl", "text_encoder_2.layers.2:out", {}, (True, True)),
        ("sdxl", "text_encoder_2.layers.3:out", {}, (False, True)),
        ("sdxl", "text_encoder_2.layers.2:out", {"clip_skip": 1}, (False, True)),
        ("sd3", "text_encoder.layers.1:out", {}, (True, True)),
        ("flux", "text_encoder.layers.1:out", {}, (False, True)),
        ("flux", "text_encoder_2.layers.2:out", {}, (True, False)),
        ("sd", f"{BLOCK}:out", {}, (True, False)),
    ],
)
def test_what_is_consumed(hosts, kind, site, options, want):
    host = hosts(kind)
    assert tuple(host.consumed(site, **options)) == want
    if want[0]:
        assert tuple(host.check_consumed(site, **options)) == want
        return
    with pytest.raises(InputError, match="only the pooled vector" if want[1] else "neither the pooled"):
        host.check_consumed(site, **options)
    if want[1]:
        host.check_consumed(site, pooled=True, **options)


def test_generate_refuses_an_edit_that_nothing_reads(hosts):
    host = hosts("sdxl")
    with host.edit("text_encoder.layers.2:out", lambda r: r + 1), pytest.raises(InputError, match="does not consume"):
        host.generate(PROMPTS, steps=1, height=16, width=16)
    clean = host.generate(PROMPTS, steps=1, height=16, width=16)
    with host.edit("text_encoder_2.text_projection:out", lambda r: r + 1):
        host.check_consumed("text_encoder_2.text_projection:out")  # the pooled vector is what such a site is
        assert not torch.equal(host.generate(PROMPTS, steps=1, height=16, width=16), clean)


def test_clip_skip_is_generated_with(hosts):
    host, seen = hosts("sd"), []
    plain, skipped = (host.generate(PROMPTS, steps=1, **more) for more in ({}, {"clip_skip": 1}))
    assert not torch.equal(plain, skipped) and "text_model" not in host.pipeline.text_encoder.__dict__
    with host.edit("text_encoder.layers.1:out", lambda r: (seen.append(1), r * 2)[1]):
        assert not torch.equal(host.generate(PROMPTS, steps=1, clip_skip=1), skipped)
    assert seen


def test_saved_and_loaded_it_is_the_same_host(hosts, folder):
    name = f"diffusers:{folder}"
    host = load_host(name)
    assert isinstance(host, DiffusionHost) and host.hint == name and host.precision == "fp32"
    assert host.fingerprint == hosts("sd").fingerprint != DiffusionHost(MAKE["sd"](seed=1)).fingerprint
    assert torch.equal(host.generate(PROMPTS, steps=2), hosts("sd").generate(PROMPTS, steps=2))
    assert "unet" in host.config() and host.default_sites()["text"].tokens == "mask"
    assert site_width(name, "text_encoder.layers.1:out[mask]") == 32
    with pytest.raises(InputError, match="cannot be told without loading"):
        site_width(name, f"{BLOCK}:update")


def test_names_and_folders_that_are_none(tmp_path, folder):
    assert parse("diffusers:stabilityai/sdxl-turbo").kind == "diffusers"
    with pytest.raises(InputError, match=r"model_index\.json does not exist"):
        parse(f"diffusers:{tmp_path}")
    with pytest.raises(InputError, match="does not exist"):
        parse(f"diffusers:{tmp_path / 'no'}")
    with pytest.raises(InputError, match="trust_remote_code is True"):
        load_host(f"diffusers:{folder}", trust_remote_code=True)
    for option, value in (("use_safetensors", False), ("custom_pipeline", "somebody/else")):
        with pytest.raises(InputError, match=f"{option} is {value}"):
            load_host(f"diffusers:{folder}", **{option: value})


def test_pickled_weights_are_not_read(hosts, tmp_path):
    hosts("sd").pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert [p.suffix for p in (tmp_path / "unet").glob("diffusion_pytorch_model.*")] == [".bin"]
    with pytest.raises(InputError, match="cannot be loaded"):
        load_host(f"diffusers:{tmp_path}")


def test_a_component_from_a_stranger_is_not_imported(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    index["vae"] = ["this_module_is_nowhere", "Anything"]
    (tmp_path / "p" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_host(f"diffusers:{tmp_path / 'p'}")


def test_half_precision(folder):
    host = load_host(f"diffusers:{folder}", precision="bf16")
    assert host.precision == "bf16" and host.model["unet"].dtype == torch.bfloat16
    seen = []
    with host.edit(f"{BLOCK}:update", lambda r: (seen.append(r.dtype), r)[1]):
        out = host.generate(PROMPTS, steps=2)
    assert out.dtype == torch.float32 and out.isfinite().all() and set(seen) == {torch.float32}
    assert torch.equal(out, host.generate(PROMPTS, steps=2))


def test_a_safety_checker_that_blanks_is_said(hosts, monkeypatch):
    host = hosts("sd")
    blank = lambda image, device, dtype: (torch.zeros_like(image), [True, False])  # noqa: E731
    monkeypatch.setattr(host.pipeline, "run_safety_checker", blank)
    before = host.blanked
    with pytest.warns(UserWarning, match="blanked 1 of 2 images"):
        host.generate(PROMPTS, steps=1)
    assert host.blanked == before + 1


def test_compiled_parts_run_eagerly_where_hooks_must_be_seen(monkeypatch):
    monkeypatch.setattr(calls, "_warned", False)
    plain = DiffusionHost(MAKE["sd"]())
    pipe = MAKE["sd"]()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    host = DiffusionHost(pipe)
    assert host.fingerprint == plain.fingerprint
    with pytest.warns(UserWarning, match="runs without compilation"):
        site = host.site(f"{BLOCK}:update")
    torch.testing.assert_close(host.generate(PROMPTS, steps=2), plain.generate(PROMPTS, steps=2), atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with host.edit(site, lambda r: r * 3), plain.edit(site, lambda r: r * 3):
            a, b = (h.generate(PROMPTS, steps=2) for h in (host, plain))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_captions_are_captured_and_extracted(hosts, folder, tmp_path):
    host = hosts("sdxl")
    ids = host.tokenize(PROMPTS)
    assert ids.shape == (2, 24) and host.tokenize.too_long([*PROMPTS, " ".join(["a"] * 11)]) == [False, False, True]
    batch = ImageTextBatch(None, ids, ["x", "y"], PROMPTS, ["0", "1"], ["s", "s"])
    got, site = [], "text_encoder_2.layers.2:out[content]"
    rows = host.capture(batch, [site])
    assert rows.x["text"].shape == (9, 48) and rows.item["text"].tolist() == [0] * 3 + [1] * 6
    with host.edit(site, lambda r: (got.append(r.clone()), r)[1]):
        host.generate(PROMPTS, steps=1, guidance=0.0, height=16, width=16)
    torch.testing.assert_close(rows.x["text"], got[0])  # what the pipeline itself computes
    several = host.read(batch, ["text_encoder.layers.0:out[eos]", site])
    assert several[0].x.shape == (2, 32) and torch.equal(several[1].x, rows.x["text"])
    with pytest.raises(InputError, match="while it generates"):
        host.capture(batch, ["unet.mid_block.attentions.0:out"])

    with ShardWriter(tmp_path / "shards", "s", per_shard=4) as w:
        for i in range(6):
            w.write(f"k{i}", {"txt": " ".join(WORDS[: 2 + i])})
    out = extract(f"diffusers:{folder}", str(tmp_path / "shards"), tmp_path / "store", workers=0, device="cpu",
                  sites="text_encoder.layers.1:out[content]", progress=False)  # fmt: skip
    store = ActivationStore(out)
    assert len(store) == 6 and len(store.load(modality="text")) == sum(range(2, 8))
    assert store.sites["text"].module == "text_encoder.encoder.layers.1"


def test_info_on_a_pipeline(hosts, folder):
    found = describe(str(folder))
    assert found["pipeline"] == "StableDiffusionPipeline" and found["fingerprint"] == hosts("sd").fingerprint
    assert found["components"]["unet"] == "UNet2DConditionModel" and "safety_checker" not in found["components"]


def test_other_pipelines_are_refused():
    class Odd:
        """No text-to-image pipeline."""

        def encode_prompt(self, prompt):
            """With other arguments."""

    with pytest.raises(InputError, match="Odd is no text-to-image pipeline"):
        DiffusionHost(Odd())
    assert clip_text().config.eos_token_id != 2  # CLIPTextModel would look for the largest id


def test_pipelines_that_draw_on_pictures_are_refused(hosts):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    parts = hosts("sd").pipeline.components
    for cls in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
        pipe = cls(**parts, requires_safety_checker=False)
        with pytest.raises(InputError, match=f"{cls.__name__} draws on an image that it is given .*image"):
            DiffusionHost(pipe)
    pipe = MAKE["sd"]()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(InputError, match="takes 9 channels, but latents have 4"):
        DiffusionHost(pipe)


def test_a_scheduler_that_fails_is_named(hosts, monkeypatch):
    host = hosts("sd")

    def broken(self, *args, **kwargs):
        raise IndexError("index 21 is out of bounds")

    monkeypatch.setattr(type(host.pipeline.scheduler), "set_timesteps", broken)
    with pytest.raises(InputError, match=r"DDIMScheduler fails with 3 steps \(IndexError: index 21"):
        host.generate(PROMPTS, steps=3)
    monkeypatch.undo()
    monkeypatch.setattr(host.pipeline, "check_inputs", broken)
    with pytest.raises(IndexError):  # not the scheduler's
        host.generate(PROMPTS, steps=3)


def test_stable_diffusion_3_without_its_t5(hosts, tmp_path):
    hosts("sd3").pipeline.save_pretrained(tmp_path)
    host = load_host(f"diffusers:{tmp_path}")
    assert host.pipeline.text_encoder_3 is None and host.fingerprint == hosts("sd3").fingerprint
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="has no text_encoder_3, so it is loaded without"):
        assert load_host(f"diffusers:{tmp_path}").fingerprint == host.fingerprint

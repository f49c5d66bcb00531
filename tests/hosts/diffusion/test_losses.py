"""The loss of denoising: derivatives, draws that are an item's own, and pipelines that it is not offered for."""

import io

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmsae.activations import ActivationStore, extract
from mmsae.hosts import DiffusionHost, load_host
from mmsae.hosts.diffusion.patch_autoencoder import PatchAutoencoder
from mmsae.hosts.gradient import reading
from mmsae.shards import Reader, ShardWriter, make_pipeline
from mmsae.types import ImageTextBatch, InputError
from tests.helpers.diffusion import scheduler, sd

PROMPTS = ["a red circle", "large blue square on white background", "the cat"]
UNET = "unet.up_blocks.0.attentions.1:update"
SITES = [UNET, "unet.down_blocks.0:out", "text_encoder.layers.1:out[content]", "text_encoder.layers.0:out[all]"]


def batch_of(host, which=(0, 1, 2), size=16):
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    which, texts = list(which), [PROMPTS[i] for i in which]
    uids = [f"item {i}" for i in which]
    return ImageTextBatch(images[which], host.tokenize(texts), uids, texts, uids, uids)


def patches():
    """An autoencoder whose latents are not drawn."""
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = PatchAutoencoder.fit(images, latent_channels=4, patch_size=2)
    vae.register_to_config(scaling_factor=0.5)
    return vae


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_gradients_are_derivatives_of_the_loss(site, predicts):
    pipe = sd()
    pipe.scheduler = scheduler(prediction_type=predicts)
    host = DiffusionHost(pipe, "sd")
    batch, loss = batch_of(host), host.objective("diffusion")
    rows = host.read(batch, [site], "diffusion")[0]
    assert rows.grad.shape == rows.x.shape and rows.grad.norm() > 0 and set(rows.item.tolist()) == {0, 1, 2}
    along = (
        rows.grad / rows.grad.norm()
        + F.normalize(torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(0)), dim=1) / len(rows.x) ** 0.5
    )
    values = []
    for sign in (1e-2, -1e-2):
        with host.edit(site, lambda x, d=sign * along: x + d), torch.no_grad():
            values.append(float(loss.terms(host, batch).double().sum()))
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float((rows.grad * along).sum()), rel=2e-2)


def test_rows_of_text_are_those_that_are_read_without(hosts):
    host, site = hosts("sd"), "text_encoder.layers.1:out[mask]"
    with_grad, plain = (host.capture(batch_of(host), [site], g) for g in ("diffusion", ""))
    for field in ("x", "item", "position", "special"):
        assert torch.equal(getattr(with_grad, field)["text"], getattr(plain, field)["text"])
    assert host.capture(batch_of(host), None, "diffusion").grad["text"].abs().max() > 0


@pytest.mark.parametrize("kind", ["sd", "patches", "tiny"])
def test_an_item_has_the_same_noise_and_gradient_in_every_batch(kind):
    pipe = sd()
    if kind == "patches":
        pipe.vae = patches()
    elif kind == "tiny":
        pipe.vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()  # fmt: skip
    host = DiffusionHost(pipe, kind)
    sites = [UNET, "text_encoder.layers.1:out[content]"]
    whole = host.capture(batch_of(host), sites, "diffusion")
    parts = [host.capture(batch_of(host, w), sites, "diffusion") for w in ((0, 1), (2,))]
    turned = host.capture(batch_of(host, (2, 0, 1)), sites, "diffusion")
    torch.manual_seed(5)  # nothing hangs on the global generator
    again = host.capture(batch_of(host), sites, "diffusion")
    for m in ("text", "image"):
        assert torch.equal(again.grad[m], whole.grad[m]) and torch.equal(again.x[m], whole.x[m])
        close = {"atol": 1e-6, "rtol": 1e-3}
        torch.testing.assert_close(torch.cat([t.grad[m] for t in parts]), whole.grad[m], **close)
        for i, j in enumerate((2, 0, 1)):
            a, b = turned.grad[m][turned.item[m] == i], whole.grad[m][whole.item[m] == j]
            torch.testing.assert_close(a, b, **close)
    other = host.capture(batch_of(host), sites, host.denoising(seed=1))
    assert (other.grad["image"] - whole.grad["image"]).norm() > 0.1 * whole.grad["image"].norm()
    twin = batch_of(host, (0, 0))
    terms = host.objective("diffusion").terms(host, twin._replace(uids=["x", "y"]))
    assert terms.shape == (2,) and (terms[0] - terms[1]).abs() > 1e-4  # another uid, another noise


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_loss_is_that_of_training(kind, predicts):
    """What the denoiser is called with and judged by, beside diffusers' arithmetic."""
    pipe, seen = sd(), []
    pipe.vae, pipe.scheduler = patches(), scheduler(kind, prediction_type=predicts)
    host, train = DiffusionHost(pipe, "sd"), scheduler("DDPMScheduler")
    see = lambda m, args, kwargs, out: seen.append((*args, kwargs["encoder_hidden_states"], *out))  # noqa: E731
    host.model["unet"].register_forward_hook(see, with_kwargs=True)
    batch = batch_of(host)
    terms = host.objective("diffusion").terms(host, batch)
    ((noisy, times, states, out),) = seen
    assert len(set(times.tolist())) == 3 and 0 <= times.min() and times.max() < 1000
    torch.testing.assert_close(states, pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0])
    x = pipe.vae.encode(batch.images).latent_dist.mode() * pipe.vae.config.scaling_factor
    a = train.alphas_cumprod[times].view(-1, 1, 1, 1)
    noise = (noisy - a.sqrt() * x) / (1 - a).sqrt()
    assert noise.mean().abs() < 0.15 and 0.9 < noise.std() < 1.1
    torch.testing.assert_close(noisy, train.add_noise(x, noise, times))
    want = noise if predicts == "epsilon" else train.get_velocity(x, noise, times)
    torch.testing.assert_close(terms, (out - want).square().mean((1, 2, 3)), atol=1e-4, rtol=1e-4)


def test_bf16_keeps_the_direction(hosts):
    exact, coarse = hosts("sd"), DiffusionHost(sd().to(torch.bfloat16), "sd")
    a, b = (h.read(batch_of(exact), [UNET], "diffusion")[0].grad for h in (exact, coarse))
    assert b.dtype == torch.float32 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98


def test_shards_are_stored_with_gradients(tmp_path):
    """Images of any size and captions become what the loss reads, in workers too."""
    sd().save_pretrained(tmp_path / "sd")
    name, shards = f"diffusers:{tmp_path / 'sd'}", str(tmp_path / "shards")
    draw = np.random.default_rng(0)
    with ShardWriter(shards, "s", per_shard=3) as w:
        for i, text in enumerate(PROMPTS):
            png = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (20 + 4 * i, 40, 3), dtype=np.uint8)).save(png, "PNG")
            w.write(f"k{i}", {"png": png.getvalue(), "txt": text})
    site, options = {"sites": UNET, "gradient": "diffusion"}, {"device": "cpu", "progress": False}
    store = ActivationStore(extract(name, shards, tmp_path / "store", workers=1, batch_size=2, **site, **options))
    host = load_host(name)
    made = reading(host, ["image"], gradient="diffusion")
    white = made["transform"](Image.new("RGB", (30, 20), "white"))
    assert white.shape == (3, 16, 16) and white.min() == white.max() == 1
    (batch,) = make_pipeline(shards, Reader.of(made["transform"], made["tokenize"], 3), train=False)
    want = host.capture(batch, [UNET], "diffusion")
    got = store.tokens({"image": "image"}, {"image": np.arange(len(want.x["image"]))})
    torch.testing.assert_close(got.x["image"], want.x["image"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.grad["image"], want.grad["image"], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "kind, why",
    [
        ("sdxl", "StableDiffusionXLPipeline: it has the text encoders text_encoder, text_encoder_2, not one"),
        ("sd3", "StableDiffusion3Pipeline: its denoiser is no UNet"),
        ("flux", "FluxPipeline: its denoiser is no UNet"),
    ],
)
def test_pipelines_that_are_not_covered_are_refused(hosts, kind, why):
    host = hosts(kind)
    assert host.objectives == {}
    with pytest.raises(InputError, match=f"gradient 'diffusion' is not offered for {why}"):
        host.capture(batch_of(hosts("sd")), None, "diffusion")


def test_parts_that_are_not_covered_are_refused():
    host = DiffusionHost(sd(time_cond_proj_dim=8), "lcm")
    with pytest.raises(InputError, match=r"more than text and time \(time_cond_proj_dim\)"):
        host.denoising()
    host = DiffusionHost(sd(), "sd")
    for other, why in (
        (scheduler(prediction_type="sample"), "prediction_type is sample"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has no alphas_cumprod"),
    ):
        host.pipeline.scheduler = other
        with pytest.raises(InputError, match=why):
            host.objective("diffusion")


def test_what_has_no_gradient_is_refused(hosts):
    host = hosts("sd")
    batch = batch_of(host)
    for lacks in ({"images": None}, {"texts": None}):
        with pytest.raises(InputError, match="needs images and texts"):
            host.capture(batch._replace(**lacks), [UNET], "diffusion")
    with host.edit(UNET, lambda x: x, steps=(0, 2)), pytest.raises(InputError, match="holds at steps"):
        host.capture(batch, [UNET], "diffusion")
    with pytest.raises(InputError, match=r"while it generates .* or with gradient 'diffusion'"):
        host.capture(batch, [UNET])
    with pytest.raises(InputError, match="gradient is 'lm', but the losses of host sd are: diffusion"):
        host.capture(batch, [UNET], "lm")
    with pytest.raises(InputError, match="underflow in fp16"):
        DiffusionHost(sd().to(torch.float16), "sd").objective("diffusion")

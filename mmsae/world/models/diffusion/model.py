"""The parts of a tiny text-to-image Stable Diffusion of random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmsae.world.models.options import Texts
from mmsae.world.models.pairs import LoadedPairs
from mmsae.world.models.tokenizer import word_tokenizer

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, PreTrainedTokenizerFast

PATCH = 4


def one_object(meta: dict[str, Any]) -> bool:
    """Whether a sample of the generated world shows one object; samples of other data, which do not say, are kept."""
    return len(meta.get("objects", (None,))) == 1


def encode(pairs: LoadedPairs, channels: int, whiten: float) -> tuple[Any, torch.Tensor, float]:
    """The autoencoder, the scaled latents ``(N, C, h, w)``, and its PSNR in dB."""
    from mmsae.hosts.diffusion.patch_autoencoder import PatchAutoencoder

    x = torch.from_numpy(pairs.images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    vae = PatchAutoencoder.fit(x[:4000], channels, PATCH, whiten)
    latents, error = [], 0.0
    with torch.no_grad():
        for part in x.split(1000):
            z = vae.encode(part).latent_dist.mode()
            error += (vae.decode(z).sample - part).square().sum().item()
            latents.append(z * vae.config.scaling_factor)
    psnr = 10 * torch.tensor(4.0 * x.numel() / error).log10().item()  # values in [-1, 1]: peak 2
    return vae, torch.cat(latents), psnr


HEAD = 32  # channels a head of the text encoder


def build_tokenizer(words: list[str], context_length: int) -> PreTrainedTokenizerFast:
    """Word tokenizer that says its length to pipelines: they pad every prompt to it."""
    tokenizer = word_tokenizer(words)
    tokenizer.model_max_length = context_length
    return tokenizer


def build_text_encoder(tokenizer: PreTrainedTokenizerFast, texts: Texts, seed: int) -> CLIPTextModel:
    """A ``CLIPTextModel`` with weights from ``seed``; the global random state is as before."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width = texts.text_width
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=texts.text_layers,
        num_attention_heads=width // HEAD,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return CLIPTextModel(config)


def build_unet(
    latent_size: int, latent_channels: int, text_width: int, channels: tuple[int, ...], seed: int
) -> UNet2DConditionModel:
    """A denoiser with cross-attention in every block, weights from ``seed``."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            down_block_types=("CrossAttnDownBlock2D",) * len(channels),
            up_block_types=("CrossAttnUpBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=1,
            cross_attention_dim=text_width,
            attention_head_dim=2,  # read as the number of heads; with more, attention takes half of a step
            norm_num_groups=8,
        )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, predicting v (Salimans & Ho, arXiv 2202.00512)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> StableDiffusionPipeline:
    """The pipeline; no safety checker, no bar."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

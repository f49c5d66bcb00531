"""A tiny text-to-image Stable Diffusion trained from nothing on any image-text shards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmsae.files import atomic_folder, check_writable, disk_errors
from mmsae.shards import FAULT_LIMIT
from mmsae.types import InputError
from mmsae.world.models.clip import LONGEST, SHORTEST, _threads
from mmsae.world.models.diffusion.train import DiffusionRecipe, Examples, train
from mmsae.world.models.loop import Pairs, load_pairs
from mmsae.world.models.tokenizer import token_ids, vocabulary, word_tokenizer, words_of

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, PreTrainedTokenizerFast


STEPS = 500
_PATCH = 4


def one_object(meta: dict[str, Any]) -> bool:
    """Whether a sample of the generated world shows one object; samples of other data, which do not say, are kept."""
    return len(meta.get("objects", (None,))) == 1


def pretrain_diffusion(
    shards: str | list[str],
    out: str,
    steps: int = STEPS,
    image_size: int = 32,
    seed: int = 0,
    batch_size: int = 32,
    lr: float = 0.02,
    adam_lr: float = 2e-3,
    weight_decay: float = 0.01,
    text_width: int = 64,
    text_layers: int = 2,
    channels: tuple[int, ...] = (32, 64),
    latent_channels: int = 12,
    whiten: float = 0.5,
    context_length: int | None = None,
    max_words: int = 20_000,
    caption_field: str = "",
    max_gigabytes: float = 4.0,
    fault_limit: float = FAULT_LIMIT,
    overwrite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a tiny text-to-image Stable Diffusion on image-text shards and save it as a diffusers folder.

    The result loads as ``diffusers:OUT``. Text encoder and denoiser are trained together; the autoencoder is a linear
    one of patches, fitted in closed form. Where samples tell their objects, as those of the generated world do, only
    pictures of one object are used: at this size, two objects with their attributes are not learned.

    Args:
        shards: Path, glob or brace pattern of webdataset shards (.tar, .tar.gz), or a list of them.
        out: Folder to write the pipeline to.
        steps: Optimiser steps.
        image_size: Pixels a side, a multiple of 8; other images are resized and cut to their middle.
        seed: Of weights, order, noise and times.
        batch_size: Pictures a step.
        lr: Peak learning rate of Muon, for matrices and convolution kernels.
        adam_lr: Peak learning rate of AdamW, for embeddings, norms and biases.
        weight_decay: Decoupled weight decay.
        text_width: Width of the text encoder, a multiple of 32.
        text_layers: Its layers.
        channels: Channels of the denoiser's levels, multiples of 16; every level but the first halves the map.
        latent_channels: Channels of the latents, at most 48.
        whiten: 1 gives all latent channels equal variance, 0 leaves them as principal components have it.
        context_length: Tokens of a text; longer captions lose their last words. Default: the longest caption and its
            end mark, between 16 and 40.
        max_words: The most frequent words become the vocabulary; others read as ``<unk>``.
        caption_field: Field of json that holds the caption. Default: ``captions``, the txt file or ``caption``.
        max_gigabytes: Refuse data whose decoded images need more memory.
        fault_limit: Largest share of unreadable samples.
        overwrite: Replace what is already in OUT.
        device: Where to train.
        threads: CPU threads. Default: one, the operations are too small to share.
        progress: Say what is done and show bars.

    Returns:
        What was done: steps, loss, sizes, faults, seconds; OUT/training.json has it too, with the curve of the loss.

    Raises:
        InputError: OUT is in use, the shards or an argument are not usable.
    """
    clock = time.perf_counter(), time.process_time()
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise InputError(f"{out} exists and is not empty: name another folder, or overwrite it with --overwrite true")
    check_writable(target)
    cell = _PATCH * 2 ** (len(channels) - 1)
    if steps < 1 or batch_size < 1 or text_width % 32 or image_size % cell or any(c % 16 for c in channels):
        raise InputError(
            f"steps {steps}, batch_size {batch_size}, text_width {text_width}, image_size {image_size} and channels"
            f" {list(channels)} must be at least 1, at least 1, a multiple of 32, of {cell} and of 16"
        )
    pairs = load_pairs(
        shards,
        image_size,
        caption_field=caption_field,
        max_gigabytes=max_gigabytes,
        fault_limit=fault_limit,
        keep=one_object,
        progress=progress,
    )

    words = vocabulary(pairs.texts, max_words)
    longest = max(len(words_of(t)) for t in pairs.texts) + 1
    tokenizer = build_tokenizer(words, context_length or min(max(longest, SHORTEST), LONGEST))
    recipe = DiffusionRecipe(steps, batch_size, seed, lr, adam_lr, weight_decay)
    with _threads(threads or 1):
        vae, latents, psnr = _latents(pairs, latent_channels, whiten)
        text_encoder = build_text_encoder(tokenizer, text_width, text_layers, seed).to(device)
        unet = build_unet(latents.shape[-1], latent_channels, text_width, channels, seed + 1).to(device)
        ids = token_ids(tokenizer, [*pairs.texts, ""], tokenizer.model_max_length)
        n_parameters = {k: sum(p.numel() for p in m.parameters()) for k, m in (("text", text_encoder), ("unet", unet))}
        if progress:
            print(
                f"{len(pairs.images)} images ({pairs.images.nbytes / 1e6:.0f} MB) and {len(pairs.texts)} different"
                f" captions of {len(words)} words in memory; autoencoder {psnr:.1f} dB;"
                f" {sum(n_parameters.values()) / 1e6:.2f} M parameters, {steps} steps of {batch_size}"
            )
        examples = Examples(latents, ids, pairs.captions, pairs.counts)
        result = train(unet, text_encoder, build_scheduler(), examples, recipe, progress)
    stats = {
        "out": str(target),
        "steps": steps,
        **result,
        "images": len(pairs.images),
        "captions": len(pairs.texts),
        "words": len(words),
        "too_long": sum(len(words_of(t)) >= tokenizer.model_max_length for t in pairs.texts),
        "autoencoder_psnr": psnr,
        "parameters": n_parameters,
        "recipe": recipe._asdict(),
        "faults": pairs.faults.to_dict(),
        "seconds": {"wall": time.perf_counter() - clock[0], "cpu": time.process_time() - clock[1]},
    }
    with disk_errors(target), atomic_folder(target) as folder:
        build_pipeline(vae, text_encoder.cpu(), tokenizer, unet.cpu()).save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(stats, indent=1))
    if progress:
        print(f"{steps} steps, loss {result['loss']:.3f}, {stats['seconds']['wall']:.0f} s; wrote {target}")
    return {k: v for k, v in stats.items() if k != "curve"}


def _latents(pairs: Pairs, channels: int, whiten: float) -> tuple[Any, torch.Tensor, float]:
    """The autoencoder, the scaled latents ``(N, C, h, w)``, and its PSNR in dB."""
    from mmsae.hosts.diffusion.patch_autoencoder import PatchAutoencoder

    x = torch.from_numpy(pairs.images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    vae = PatchAutoencoder.fit(x[:4000], channels, _PATCH, whiten)
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


def build_text_encoder(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, seed: int) -> CLIPTextModel:
    """A ``CLIPTextModel`` with weights from ``seed``; the global random state is as before."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
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

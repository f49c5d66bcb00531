"""``mmsae pretrain-clip`` and ``mmsae pretrain-diffusion``: small hosts trained from nothing on any shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mmsae.errors import InputError
from mmsae.world.models.options import PairData, ResumedRun, Texts, Training, TrainRun

if TYPE_CHECKING:
    from pathlib import Path


def pretrain_clip(
    shards: str | list[str],
    out: str,
    image_size: int = 32,
    image_tower: str = "test_resnet",
    embed_dim: int = 64,
    augment: Literal["auto", "none", "photo"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    training: Training = Training(steps=800, batch_size=256, lr=0.03),
    texts: Texts = Texts(),
    data: PairData = PairData(),
    run: ResumedRun = ResumedRun(),
) -> dict[str, Any]:
    """Train a small CLIP on image-text shards and save it as an open_clip folder.

    The result loads everywhere as ``local-dir:OUT``. All images are decoded once and kept in memory. Captions that are
    equal count as equally right for each other's images; a sample whose json holds a list ``captions`` shows one of
    them at random; neighbours with equal ``pair`` in their json share a batch and so are each other's hard negatives.
    While it runs, OUT.partial holds its state: the same command, given again after an interruption, goes on from there.

    Args:
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or a list of
            them (docs/how-to/data.md).
        out: Folder to write the model to.
        image_size: Pixels a side; other images are resized and cut to their middle.
        image_tower: A timm convolutional network by name, without pretrained weights.
        embed_dim: Width of the joint embedding.
        augment: ``photo`` mirrors half of the images and shifts all by up to a tenth; ``auto`` does so unless captions
            speak of left or right.
        precision: Precision of the image tower: ``auto`` is bf16 where the device computes in it, else fp32.
        training: How to train.
        texts: The text encoder.
        data: What is made of the samples' files.
        run: Device, threads, and what becomes of OUT.

    Returns:
        What was done: steps, loss, sizes, faults, seconds; OUT/training.json has it too, with the curve of the loss.

    Raises:
        InputError: OUT is in use, the shards or an argument are not usable.
    """
    import timm

    from mmsae.world.models import clip, contrastive, loop
    from mmsae.world.models.pairs import load_pairs, speak_of_sides
    from mmsae.world.models.tokenizer import Words, token_ids, word_tokenizer

    clock, target = loop.Clock(), loop.free_folder(out, run.overwrite)
    if not timm.is_model(image_tower):
        raise InputError(f"timm has no model {image_tower!r} for the image tower")
    if training.steps < 1 or training.batch_size < 2 or texts.text_width % 32:
        raise InputError(
            f"steps {training.steps}, batch_size {training.batch_size} and text_width {texts.text_width} must be at"
            " least 1, at least 2 and a multiple of 32"
        )
    pairs = load_pairs(shards, image_size, data, progress=run.progress)
    words = Words.of(pairs.texts, texts)
    config = clip.clip_config(embed_dim, image_size, image_tower, words, texts)
    recipe = contrastive.ClipTraining(
        **vars(training) | {"batch_size": min(training.batch_size, len(pairs.images))},
        photo=augment == "photo" or (augment == "auto" and not speak_of_sides(pairs.texts)),
        bf16=precision == "bf16" or (precision == "auto" and clip.computes_bf16(run.device)),
    )
    model = clip.build_clip(config, recipe.seed).to(run.device)
    parameters = sum(p.numel() for p in model.parameters())
    if run.progress:
        print(
            f"{pairs.said()} of {len(words.words)} words in memory; {parameters / 1e6:.2f} M parameters, {recipe.steps}"
            f" steps of {recipe.batch_size}{', mirrored and shifted' if recipe.photo else ''}"
        )
    identity = {"recipe": vars(recipe), "model": config, "data": pairs.digest()}
    state = loop.RunState(target.with_name(target.name + ".partial"), identity, run.checkpoint_every)
    tokenizer = word_tokenizer(words.words)
    ids = token_ids(tokenizer, pairs.texts, words.context_length)
    with loop.cpu_threads(run.threads or (1 if image_size <= 64 else None)):
        found = contrastive.train(model, pairs, ids, recipe, state, run.progress)
    found |= {"logit_scale": model.logit_scale.exp().item(), "images": len(pairs.images), "captions": len(pairs.texts)}
    found |= {"words": len(words.words), "too_long": words.too_long, "parameters": parameters}
    found["faults"] = pairs.faults.to_dict()

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        clip.save_clip(folder, model, config)

    stats = loop.finish(target, save, recipe, found, clock, run.progress)
    state.file.unlink(missing_ok=True)
    return stats


def pretrain_diffusion(
    shards: str | list[str],
    out: str,
    image_size: int = 32,
    channels: tuple[int, ...] = (32, 64),
    latent_channels: int = 12,
    whiten: float = 0.5,
    training: Training = Training(steps=500, lr=0.02, adam_lr=2e-3, weight_decay=0.01),
    texts: Texts = Texts(),
    data: PairData = PairData(),
    run: TrainRun = TrainRun(),
) -> dict[str, Any]:
    """Train a tiny text-to-image Stable Diffusion on image-text shards and save it as a diffusers folder.

    The result loads as ``diffusers:OUT``. Text encoder and denoiser are trained together; the autoencoder is a linear
    one of patches, fitted in closed form. Where samples tell their objects, as those of the generated world do, only
    images of one object are used: at this size, two objects with their attributes are not learned.

    Args:
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or a list of
            them (docs/how-to/data.md).
        out: Folder to write the pipeline to.
        image_size: Pixels a side, a multiple of 8; other images are resized and cut to their middle.
        channels: Channels of the denoiser's levels, multiples of 16; every level but the first halves the map.
        latent_channels: Channels of the latents, at most 48.
        whiten: 1 gives all latent channels equal variance, 0 leaves them as principal components have it.
        training: How to train.
        texts: The text encoder.
        data: What is made of the samples' files.
        run: Device, threads, and what becomes of OUT.

    Returns:
        What was done: steps, loss, sizes, faults, seconds; OUT/training.json has it too, with the curve of the loss.

    Raises:
        InputError: OUT is in use, the shards or an argument are not usable.
    """
    from mmsae.world.models import loop
    from mmsae.world.models.diffusion import model as parts
    from mmsae.world.models.diffusion.train import DiffusionTraining, Examples, train
    from mmsae.world.models.pairs import load_pairs
    from mmsae.world.models.tokenizer import Words, token_ids

    clock, target = loop.Clock(), loop.free_folder(out, run.overwrite)
    cell = parts.PATCH * 2 ** (len(channels) - 1)
    bad = training.steps < 1 or training.batch_size < 1 or texts.text_width % 32 or image_size % cell
    if bad or any(c % 16 for c in channels):
        raise InputError(
            f"steps {training.steps}, batch_size {training.batch_size}, text_width {texts.text_width}, image_size"
            f" {image_size} and channels {list(channels)} must be at least 1, at least 1, a multiple of 32, of {cell}"
            " and of 16"
        )
    pairs = load_pairs(shards, image_size, data, keep=parts.one_object, progress=run.progress)
    words = Words.of(pairs.texts, texts)
    recipe = DiffusionTraining(**vars(training))
    tokenizer = parts.build_tokenizer(words.words, words.context_length)
    with loop.cpu_threads(run.threads or 1):
        vae, latents, psnr = parts.encode(pairs, latent_channels, whiten)
        text_encoder = parts.build_text_encoder(tokenizer, texts, recipe.seed).to(run.device)
        unet = parts.build_unet(latents.shape[-1], latent_channels, texts.text_width, channels, recipe.seed + 1)
        unet = unet.to(run.device)
        ids = token_ids(tokenizer, [*pairs.texts, ""], words.context_length)
        parameters = {k: sum(p.numel() for p in m.parameters()) for k, m in (("text", text_encoder), ("unet", unet))}
        if run.progress:
            print(
                f"{pairs.said()} of {len(words.words)} words in memory; autoencoder {psnr:.1f} dB;"
                f" {sum(parameters.values()) / 1e6:.2f} M parameters, {recipe.steps} steps of {recipe.batch_size}"
            )
        examples = Examples(latents, ids, pairs.captions, pairs.counts)
        found = train(unet, text_encoder, parts.build_scheduler(), examples, recipe, run.progress)
    found |= {"images": len(pairs.images), "captions": len(pairs.texts), "words": len(words.words)}
    found |= {"too_long": words.too_long, "autoencoder_psnr": psnr, "parameters": parameters}
    found["faults"] = pairs.faults.to_dict()
    pipeline = parts.build_pipeline(vae, text_encoder.cpu(), tokenizer, unet.cpu())
    return loop.finish(target, pipeline.save_pretrained, recipe, found, clock, run.progress)

"""A small open_clip model trained from nothing on any image-text shards."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from mmsae.files import atomic_folder, check_writable, disk_errors
from mmsae.shards import FAULT_LIMIT
from mmsae.types import InputError
from mmsae.world.models.contrastive import Recipe, train
from mmsae.world.models.loop import load_pairs
from mmsae.world.models.tokenizer import token_ids, vocabulary, word_tokenizer, words_of

LONGEST, SHORTEST = 40, 16  # bounds of the context length where it is taken from the captions
_SIDES = re.compile(r"\b(left|right)\b")


def pretrain_clip(
    shards: str | list[str],
    out: str,
    steps: int = 800,
    image_size: int = 32,
    seed: int = 0,
    batch_size: int = 256,
    lr: float = 0.03,
    adam_lr: float = 3e-3,
    weight_decay: float = 0.05,
    image_tower: str = "test_resnet",
    embed_dim: int = 64,
    text_width: int = 64,
    text_layers: int = 2,
    context_length: int | None = None,
    max_words: int = 20_000,
    augment: Literal["auto", "none", "photo"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    caption_field: str = "",
    max_gigabytes: float = 4.0,
    fault_limit: float = FAULT_LIMIT,
    checkpoint_every: int = 100,
    overwrite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a small CLIP on image-text shards and save it as an open_clip folder.

    The result loads everywhere as ``local-dir:OUT``. All images are decoded once and kept in memory. Captions that are
    equal count as equally right for each other's images; a sample whose json holds a list ``captions`` shows one of
    them at random; neighbours with equal ``pair`` in their json share a batch and so are each other's hard negatives.
    While it runs, OUT.partial holds its state: the same command, given again after an interruption, goes on from there.

    Args:
        shards: Path, glob or brace pattern of webdataset shards (.tar, .tar.gz), or a list of them.
        out: Folder to write the model to.
        steps: Optimiser steps.
        image_size: Pixels a side; other images are resized and cut to their middle.
        seed: Of weights, order and augmentation.
        batch_size: Pairs a step; at most as many as there are.
        lr: Peak learning rate of Muon, for matrices and convolution kernels.
        adam_lr: Peak learning rate of AdamW, for embeddings, norms and biases.
        weight_decay: Decoupled weight decay.
        image_tower: A timm convolutional network by name, without pretrained weights.
        embed_dim: Width of the joint embedding.
        text_width: Width of the text transformer, a multiple of 32.
        text_layers: Layers of the text transformer.
        context_length: Tokens of a text; longer captions lose their last words. Default: the longest caption and its
            end mark, between 16 and 40.
        max_words: The most frequent words become the vocabulary; others read as ``<unk>``.
        augment: ``photo`` mirrors half of the images and shifts all by up to a tenth; ``auto`` does so unless captions
            speak of left or right.
        precision: Of the image tower: ``auto`` is bf16 where the device computes in it, else fp32.
        caption_field: Field of json that holds the caption. Default: ``captions``, the txt file or ``caption``.
        max_gigabytes: Refuse data whose decoded images need more memory.
        fault_limit: Largest share of unreadable samples.
        checkpoint_every: Steps between two writes of OUT.partial; 0 writes none.
        overwrite: Replace a model that is already in OUT.
        device: Where to train.
        threads: CPU threads. Default: one for images up to 64 pixels, whose operations are too small to share (on a
            busy machine two threads are slower than one by a factor of three); else torch's own number.
        progress: Say what is done and show bars.

    Returns:
        What was done: steps, loss, sizes, faults, seconds; OUT/training.json has it too, with the curve of the loss.

    Raises:
        InputError: OUT is in use, the shards or an argument are not usable.
    """
    import timm

    clock = time.perf_counter(), time.process_time()
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise InputError(f"{out} exists and is not empty: name another folder, or overwrite it with --overwrite true")
    check_writable(target)
    if not timm.is_model(image_tower):
        raise InputError(f"timm has no model {image_tower!r} for the image tower")
    if steps < 1 or batch_size < 2 or text_width % 32:
        raise InputError(
            f"steps {steps}, batch_size {batch_size} and text_width {text_width} must be at least 1, at least 2 and a"
            " multiple of 32"
        )
    pairs = load_pairs(
        shards,
        image_size,
        caption_field=caption_field,
        max_gigabytes=max_gigabytes,
        fault_limit=fault_limit,
        progress=progress,
    )
    words = vocabulary(pairs.texts, max_words)
    longest = max(len(words_of(t)) for t in pairs.texts) + 1
    config = _config(
        embed_dim=embed_dim,
        image_size=image_size,
        image_tower=image_tower,
        context_length=context_length or min(max(longest, SHORTEST), LONGEST),
        vocab_size=len(words) + 3,
        width=text_width,
        layers=text_layers,
    )
    recipe = Recipe(
        steps=steps,
        batch_size=min(batch_size, len(pairs.images)),
        seed=seed,
        lr=lr,
        adam_lr=adam_lr,
        weight_decay=weight_decay,
        photo=augment == "photo" or (augment == "auto" and not any(_SIDES.search(t.lower()) for t in pairs.texts)),
        bf16=precision == "bf16" or (precision == "auto" and computes_bf16(device)),
    )
    tokenizer = word_tokenizer(words)
    model = _build(config, seed).to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    if progress:
        print(
            f"{len(pairs.images)} images ({pairs.images.nbytes / 1e6:.0f} MB) and {len(pairs.texts)} different captions"
            f" of {len(words)} words in memory; {n_parameters / 1e6:.2f} M parameters, {steps} steps of"
            f" {recipe.batch_size}{', mirrored and shifted' if recipe.photo else ''}"
        )
    partial = target.with_name(target.name + ".partial")
    ids = token_ids(tokenizer, pairs.texts, config["text_cfg"]["context_length"])
    identity = {"recipe": recipe._asdict(), "model": config, "data": pairs.digest()}
    with _threads(threads or (1 if image_size <= 64 else torch.get_num_threads())):
        result = train(
            model,
            pairs,
            ids,
            recipe,
            state_file=partial,
            identity=identity,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
    stats = {
        "out": str(target),
        "steps": steps,
        **result,
        "logit_scale": model.logit_scale.exp().item(),
        "images": len(pairs.images),
        "captions": len(pairs.texts),
        "words": len(words),
        "too_long": sum(len(words_of(t)) >= config["text_cfg"]["context_length"] for t in pairs.texts),
        "parameters": n_parameters,
        "recipe": recipe._asdict(),
        "faults": pairs.faults.to_dict(),
        "seconds": {"wall": time.perf_counter() - clock[0], "cpu": time.process_time() - clock[1]},
    }
    with disk_errors(target), atomic_folder(target) as folder:
        tokenizer.save_pretrained(folder)
        _save(folder, model, config, stats)
    partial.unlink(missing_ok=True)
    if progress:
        print(f"{steps} steps, loss {result['loss']:.3f}, {stats['seconds']['wall']:.0f} s; wrote {target}")
    return {k: v for k, v in stats.items() if k != "curve"}


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computes_bf16(device: str) -> bool:
    """Whether bfloat16 is faster than float32 there: on CPUs only with instructions for it (else it is emulated)."""
    if torch.device(device).type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return torch.cuda.is_bf16_supported()


def _config(
    *, embed_dim: int, image_size: int, image_tower: str, context_length: int, vocab_size: int, width: int, layers: int
) -> dict[str, Any]:
    """open_clip's ``model_cfg``."""
    return {
        "embed_dim": embed_dim,
        "custom_text": True,
        "vision_cfg": {
            "image_size": image_size,
            "timm_model_name": image_tower,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": "words",  # any name: open_clip then reads the tokenizer from the folder itself
            "width": width,
            "heads": width // 32,
            "layers": layers,
        },
    }


def _build(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """A ``CustomTextCLIP`` with weights from ``seed``; the global random state is as before."""
    from open_clip.model import CustomTextCLIP

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        parts = {k: v for k, v in config.items() if k != "custom_text"}
        return CustomTextCLIP(**parts, init_logit_scale=math.log(1 / 0.07))


def _save(folder: Path, model: torch.nn.Module, config: dict[str, Any], stats: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    for name, content in (
        ("open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess}),
        ("training.json", stats),
    ):
        (folder / name).write_text(json.dumps(content, indent=1))

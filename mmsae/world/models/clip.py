"""A small open_clip model of random weights, and its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from mmsae.world.models.options import Texts
from mmsae.world.models.tokenizer import Words


def computes_bf16(device: str) -> bool:
    """Whether bfloat16 is faster than float32 there: on CPUs only with instructions for it (else it is emulated)."""
    if torch.device(device).type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return torch.cuda.is_bf16_supported()


def clip_config(embed_dim: int, image_size: int, image_tower: str, words: Words, texts: Texts) -> dict[str, Any]:
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
            "context_length": words.context_length,
            "vocab_size": len(words.words) + 3,
            "hf_tokenizer_name": "words",  # any name: open_clip then reads the tokenizer from the folder itself
            "width": texts.text_width,
            "heads": texts.text_width // 32,
            "layers": texts.text_layers,
        },
    }


def build_clip(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """A ``CustomTextCLIP`` with weights from ``seed``; the global random state is as before."""
    from open_clip.model import CustomTextCLIP

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        parts = {k: v for k, v in config.items() if k != "custom_text"}
        return CustomTextCLIP(**parts, init_logit_scale=math.log(1 / 0.07))


def save_clip(folder: Path, model: torch.nn.Module, config: dict[str, Any]) -> None:
    """Weights and configuration, as open_clip's ``local-dir:`` reads them."""
    from safetensors.torch import save_file

    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about, indent=1))

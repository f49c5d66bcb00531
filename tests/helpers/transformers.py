"""Tiny random encoders of transformers, in its own folder format, made on the spot."""

import torch
import transformers as t

from mmsae.hosts.loaded import quiet
from tests.helpers.encoders import tokenizer

SIDE = 32
_VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_IMAGE = {**_VIT, "image_size": SIDE, "patch_size": 8}
_TEXT = {**_VIT, "hidden_size": 12, "intermediate_size": 24, "vocab_size": 18, "max_position_embeddings": 10}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 17}  # of tests.helpers.encoders.tokenizer
_SWIN = {"image_size": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_CONV = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4, "image_size": SIDE}
CLIP = {"vision_config": _IMAGE, "text_config": _TEXT, "projection_dim": 8}
_SIGLIP_TEXT = {**_TEXT, "hidden_size": 16, "projection_size": 16}
SIGLIP = {"vision_config": _IMAGE, "text_config": _SIGLIP_TEXT}
_NAFLEX = {**_VIT, "patch_size": 8, "num_patches": 16}

#: ``{model_type: (class of the configuration, its arguments)}``.
CONFIGS = {
    "clip": ("CLIPConfig", CLIP),
    "siglip": ("SiglipConfig", SIGLIP),
    "siglip2": ("Siglip2Config", {**SIGLIP, "vision_config": _NAFLEX}),
    "metaclip_2": ("MetaClip2Config", CLIP),
    "vit": ("ViTConfig", _IMAGE),
    "deit": ("DeiTConfig", _IMAGE),
    "beit": ("BeitConfig", {**_IMAGE, "use_relative_position_bias": True}),
    "data2vec-vision": ("Data2VecVisionConfig", _IMAGE),
    "vit_msn": ("ViTMSNConfig", _IMAGE),
    "ijepa": ("IJepaConfig", _IMAGE),
    "dinov2": ("Dinov2Config", {**_VIT, "mlp_ratio": 2, "image_size": 56, "patch_size": 8}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", {**_VIT, "mlp_ratio": 2, "image_size": 32, "patch_size": 8}),
    "dinov3_vit": ("DINOv3ViTConfig", {**_IMAGE, "num_register_tokens": 4}),
    "convnext": ("ConvNextConfig", _CONV),
    "convnextv2": ("ConvNextV2Config", _CONV),
    "swin": ("SwinConfig", _SWIN),
    "swinv2": ("Swinv2Config", {**_SWIN, "image_size": SIDE}),
    "clip_vision_model": ("CLIPVisionConfig", {**_IMAGE, "projection_dim": 8}),
    "siglip_vision_model": ("SiglipVisionConfig", _IMAGE),
    "siglip2_vision_model": ("Siglip2VisionConfig", _NAFLEX),
    "mlcd_vision_model": ("MLCDVisionConfig", _IMAGE),
}


def image_processor(family):
    """The image processor of a family at the tests' size."""
    if family.startswith("siglip2"):
        return t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    if family.startswith("clip"):
        return t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    cls = t.SiglipImageProcessor if family.startswith("siglip") else t.ViTImageProcessor
    return cls(size={"height": SIDE, "width": SIDE})


def made(family, head="", seed=0, **more):
    """A random model; ``head`` ends its class's name, as ``ForImageClassification``."""
    name, config = CONFIGS[family]
    config = getattr(t, name)(**{**config, "initializer_range": 0.2, **more})
    cls = getattr(t, name.removesuffix("Config").removesuffix("Vision") + head) if head else t.AutoModel
    torch.manual_seed(seed)
    model = (cls if head else t.AutoModel.from_config)(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases, norms and class tokens, too
            p.add_(0.1 * torch.randn_like(p))
    return model


def save(folder, family, head="", seed=0, **more):
    """The name of a host in a folder of transformers."""
    with quiet():
        made(family, head, seed, **more).save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    if family in ("clip", "siglip", "siglip2", "metaclip_2"):
        words = tokenizer()
        words.model_input_names = ["input_ids", "attention_mask"]
        words.save_pretrained(folder)
    return f"transformers:{folder}"

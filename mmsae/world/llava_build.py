"""The parts of the tiny LLaVA: tokenizer, processor, model; all of transformers' own classes but the vision trunk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmsae.backbones.lvlm_tower import TimmTowerConfig
from mmsae.types import InputError
from mmsae.world.llava_data import DESCRIBE, NO, OBJECTS, YES, ask
from mmsae.world.tokenizer import vocabulary

PAD, UNK, BOS, EOS, IMAGE = "<pad>", "<unk>", "<s>", "</s>", "<image>"
#: LLaVA 1.5's conversation: ``USER: <image>\nQUESTION ASSISTANT: ANSWER</s>``.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}{{ '</s>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer(texts: Sequence[str], max_words: int = 20_000) -> Any:
    """Word-level tokenizer of the words in ``texts`` and in all that the tiny LLaVA is asked."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNK, BOS, EOS, IMAGE]
    words = vocabulary([*texts, *map(ask, OBJECTS), ask("shape"), DESCRIBE, YES, NO, "user: assistant:"], max_words)
    vocab = {w: i for i, w in enumerate([*special, *words])}
    t = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS, padding_side="left",
        model_input_names=["input_ids", "attention_mask"], extra_special_tokens={"image_token": IMAGE},
    )  # fmt: skip


def build_processor(tokenizer: Any, tower: TimmTowerConfig, preprocess: dict[str, Any]) -> Any:
    """LLaVA's processor, with the CLIP's own image normalisation."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = tower.image_size
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=3,
        image_mean=preprocess["mean"], image_std=preprocess["std"],
    )  # fmt: skip
    return LlavaProcessor(
        images, tokenizer, patch_size=tower.patch_size, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=TEMPLATE,
    )  # fmt: skip


def read_clip(folder: str | Path) -> tuple[TimmTowerConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """The image trunk of a CLIP of :func:`mmsae.world.clip.pretrain_clip`.

    Returns:
        The tower's configuration, the trunk's weights, and the preprocessing (``mean``, ``std``).

    Raises:
        InputError: The folder is no such CLIP, or its tower is no timm network with maps.
    """
    import timm
    from safetensors.torch import load_file

    path = Path(folder)
    try:
        config = json.loads((path / "open_clip_config.json").read_text())
        vision = config["model_cfg"]["vision_cfg"]
        name, size = vision["timm_model_name"], vision["image_size"]
        weights = load_file(path / "open_clip_model.safetensors")
        info = timm.create_model(name, pretrained=False, features_only=True).feature_info
    except (OSError, KeyError, RuntimeError, json.JSONDecodeError) as e:
        raise InputError(f"{folder} is no open_clip folder with a timm image tower: {e}") from e
    strides, widths = info.reduction(), info.channels()
    fine = next((i for i, s in enumerate(strides) if size // s <= 4), len(strides) - 1)  # 4 x 4 tokens or fewer
    levels = list(range(fine, len(strides)))
    tower = TimmTowerConfig(
        architecture=name, image_size=size, patch_size=strides[fine], levels=levels,
        hidden_size=sum(widths[i] for i in levels),
    )  # fmt: skip
    head = "visual.trunk."
    return tower, {k[len(head) :]: v for k, v in weights.items() if k.startswith(head)}, config["preprocess_cfg"]


def build_model(
    tower: TimmTowerConfig,
    trunk: dict[str, torch.Tensor],
    tokenizer: Any,
    *,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    context: int = 128,
    seed: int = 0,
) -> Any:
    """``LlavaForConditionalGeneration`` with random language model and projector; the global random state is as before.

    ``initializer_range`` is about ``1 / sqrt(hidden)``: with Llama's default of .02 a model of this width never learns
    to answer yes or no (loss at ln 2 after 845 steps; with .08 it falls within 100).
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {k: getattr(tokenizer, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=context, initializer_range=0.08, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1, vision_feature_select_strategy="full", initializer_range=0.08, **ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    missing = model.model.vision_tower.trunk.load_state_dict(trunk, strict=False)
    if missing.missing_keys:
        raise InputError(f"the CLIP's image trunk lacks {missing.missing_keys[0]} of {tower.architecture}")
    return model

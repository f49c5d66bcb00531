"""Tiny random vision-language hosts in transformers' own folder format, made on the spot."""

import torch
from PIL import Image

from mmsae.shards import Sample

WORDS = "user assistant : is there a red blue green circle square ? yes no the picture shows what left of .".split()
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
TEMPLATE = (  # LLaVA 1.5's
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer(image="<image>"):
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [image if s == "<image>" else s for s in SPECIAL]
    vocab = {w: i for i, w in enumerate([*special, *WORDS])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _text(context, **more):
    return {**LLAMA, "vocab_size": len(WORDS) + len(SPECIAL), "max_position_embeddings": context} | {
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2, **more
    }  # fmt: skip


def llava(folder, context=96, template=None, seed=0):
    """LLaVA: 24 pixels a side, 3 x 3 image tokens."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Model

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP, image_size=24), text_config=LlamaConfig(**_text(context)),
        image_token_index=4,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    more = {"chat_template": template} if template else {}
    processor = LlavaProcessor(images, tokenizer(), patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, **more)  # fmt: skip
    return _save(folder, Model(config), processor)


def llava_next(folder, side=24, patch=8, context=160, seed=0):
    """LLaVA-NeXT with tiles of ``side`` pixels."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor
    from transformers import LlavaNextForConditionalGeneration as Model

    torch.manual_seed(seed)
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    if side == 336:
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**{**CLIP, "patch_size": patch}, image_size=side),
        text_config=LlamaConfig(**_text(context)),
        image_token_index=4, image_grid_pinpoints=pinpoints, vision_feature_layer=-2,
    )  # fmt: skip
    images = LlavaNextImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(images, tokenizer(), patch_size=patch, vision_feature_select_strategy="default",
                                   num_additional_image_tokens=1)  # fmt: skip
    return _save(folder, Model(config), processor)


def qwen(folder, context=128, seed=0):
    """Qwen2.5-VL: grids follow the picture's size."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    torch.manual_seed(seed)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=_text(context, rope_scaling=rope, num_key_value_heads=2), vision_config=vision, image_token_id=4,
        vision_start_token_id=5, vision_end_token_id=6, video_token_id=7, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    t = tokenizer("<|image_pad|>")
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    template = TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**sizes), t, Qwen2VLVideoProcessor(**sizes), template)
    return _save(folder, Model(config), processor)


def _save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"lvlm:{folder}"


def picture(seed, size=(24, 24)):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=g, dtype=torch.uint8).numpy())


def sample(i, caption, image="one", meta=None, size=(24, 24)):
    picture_ = picture(i, size) if image == "one" else image
    return Sample(f"{i:032x}", f"k{i}", "s.tar", picture_, caption, meta or {}, None, {})

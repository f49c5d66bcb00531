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


def tokenizer(image="<image>", more=None, marks=("<|vision_start|>", "<|vision_end|>")):
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    own = {"<image>": image, "<|vision_start|>": marks[0], "<|vision_end|>": marks[1]}
    special = [own.get(s, s) for s in SPECIAL]
    vocab = {w: i for i, w in enumerate([*special, *WORDS])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"], **({"extra_special_tokens": more} if more else {}),
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


def qwen2(folder, context=128, seed=0):
    """Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers import Qwen2VLForConditionalGeneration as Model

    torch.manual_seed(seed)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=_text(context, rope_scaling=rope, num_key_value_heads=2), vision_config=vision, image_token_id=4,
        vision_start_token_id=5, vision_end_token_id=6, video_token_id=7, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    template = TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
    t = tokenizer("<|image_pad|>")
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**sizes), t, Qwen2VLVideoProcessor(**sizes), template)
    return _save(folder, Model(config), processor)


def qwen3(folder, context=128, seed=0):
    """Qwen3-VL: as Qwen2.5-VL, and states of the vision tower are added behind the first layers, too."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor
    from transformers import Qwen3VLForConditionalGeneration as Model

    torch.manual_seed(seed)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    config = Qwen3VLConfig(
        text_config=_text(context, rope_scaling=rope, num_key_value_heads=2, head_dim=16), vision_config=vision,
        image_token_id=4, vision_start_token_id=5, vision_end_token_id=6, video_token_id=7, pad_token_id=0,
    )  # fmt: skip
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    template = TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
    t = tokenizer("<|image_pad|>")
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes), t, Qwen3VLVideoProcessor(**sizes), template)
    return _save(folder, Model(config), processor)


def gemma(folder, context=128, seed=0):
    """Gemma 3: 32 pixels a side, 4 x 4 patches, which are averaged to 2 x 2 image tokens."""
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor
    from transformers import Gemma3ForConditionalGeneration as Model

    torch.manual_seed(seed)
    text = _text(context, num_key_value_heads=2, head_dim=16, sliding_window=64)
    config = Gemma3Config(
        text_config=text, vision_config={**CLIP, "image_size": 32}, mm_tokens_per_image=4, image_token_index=4,
        boi_token_index=5, eoi_token_index=6,
    )  # fmt: skip
    marks = ("<start_of_image>", "<end_of_image>")  # Gemma's; transformers 5.6 takes the first for a regular expression
    names = {"boi_token": marks[0], "eoi_token": marks[1], "image_token": "<image>"}
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    template = TEMPLATE.replace("<image>\n", marks[0])
    processor = Gemma3Processor(images, tokenizer(more=names, marks=marks), template, image_seq_length=4)
    model = Model(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros at first
    return _save(folder, model, processor)


def internvl(folder, context=128, seed=0):
    """InternVL: 32 pixels a side, 4 x 4 patches, 2 x 2 image tokens."""
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor
    from transformers import InternVLForConditionalGeneration as Model

    torch.manual_seed(seed)
    vision = {**CLIP, "image_size": [32, 32], "patch_size": [8, 8]}
    text = {**_text(context, num_key_value_heads=2), "model_type": "llama"}
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=4, image_seq_length=4, downsample_ratio=0.5
    )
    names = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>"}
    names |= {"context_image_token": "<image>", "video_token": "<|video_pad|>"}
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32})
    video = InternVLVideoProcessor(size={"height": 32, "width": 32})
    processor = InternVLProcessor(images, tokenizer(more=names), video, 4, chat_template=TEMPLATE)
    return _save(folder, Model(config), processor)


def idefics(folder, context=128, seed=0, smol=False):
    """Idefics 3 and SmolVLM: 32 pixels a side, 4 x 4 patches, 2 x 2 image tokens."""
    import transformers as t

    torch.manual_seed(seed)
    family = "SmolVLM" if smol else "Idefics3"
    vision = {**CLIP, "image_size": 32}
    text = {**_text(context, num_key_value_heads=2), "model_type": "llama"}
    config = getattr(t, f"{family}Config")(
        vision_config=vision, text_config=text, image_token_id=4, scale_factor=2, pad_token_id=0
    )
    extra = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    extra += [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    words = tokenizer()
    words.add_tokens(extra, special_tokens=True)
    for c in (config, config.text_config):
        c.vocab_size = len(words)
    size = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    images = getattr(t, f"{family}ImageProcessor")(**size)
    more = (t.SmolVLMVideoProcessor(**size),) if smol else ()
    processor = getattr(t, f"{family}Processor")(images, words, *more, image_seq_len=4, chat_template=TEMPLATE)
    return _save(folder, getattr(t, f"{family}ForConditionalGeneration")(config), processor)


def smolvlm(folder, context=128, seed=0):
    """SmolVLM, whose processor wants a package that spells the numbers of videos, which are not asked of it here."""
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    return idefics(folder, context, seed, smol=True)


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

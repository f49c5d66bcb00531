"""Small hosts in open_clip's local-dir format, made on the spot."""

import copy
import json

import open_clip
import torch
from safetensors.torch import save_file

WORDS = "a the red green blue circle square small large on left right of".split()
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3, "mlp_ratio": 2.0}
TEXT = {"context_length": 10, "vocab_size": 18, "hf_tokenizer_name": "none", "width": 24, "heads": 2, "layers": 3}
MODELS = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "custom": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {**TEXT, "proj_bias": True}, "custom_text": True},
    "resnet": {"embed_dim": 16, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}, "text_cfg": TEXT},
    "timm_resnet": {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
        "text_cfg": TEXT,
    },
    "timm_vit": {  # as SigLIP: the trunk's classifier projects, the text tower sees both sides and pools its last token
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "", "image_size": 160},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
        "custom_text": True,
    },
    "coca": {
        "embed_dim": 16,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
        | {"output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 10, "vocab_size": 18, "width": 24, "heads": 2, "layers": 1},
        "custom_text": True,
    },
}
CAPTIONS = ["a red circle", "the large blue square on the left", "a zebra", ""]
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}


def tokenizer():
    """Word-level tokens; ``<eos>`` has the highest id, because open_clip pools the argmax of the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<bos>", *WORDS, "x", "<eos>"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])]
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    names = {f"{n}_token": f"<{n}>" for n in ("pad", "unk", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def save_local(folder, config, seed=0, change=None):
    """An open_clip model with random weights, also in its biases and norms; ``change(model)`` before it is saved."""
    torch.manual_seed(seed)
    kw = copy.deepcopy(config)
    cls = open_clip.CustomTextCLIP if kw.pop("custom_text", False) else open_clip.CLIP
    cls = open_clip.CoCa if "multimodal_cfg" in config else cls
    model = cls(**kw)
    with torch.no_grad():
        if cls is open_clip.CoCa:  # what it never initialises: whatever was in memory, which may be NaN
            model.text_decoder.text_projection.zero_()
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if change:
            change(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    tokenizer().save_pretrained(folder)
    return f"local-dir:{folder}"


def project(b, name, x):
    """The host's projection of its pooled features, by hand."""
    if name == "text":
        p = b._text.text_projection
        return p(x) if isinstance(p, torch.nn.Module) else x @ p
    v = b.model.visual
    if hasattr(v, "attnpool"):
        return v.attnpool.c_proj(x)
    if hasattr(v, "trunk"):
        return v.head(x) if len(v.head) else v.trunk.get_classifier()(x)
    return x @ v.proj


def vit_states(model, images):
    """Token states before and after each block, by hand."""
    v = model.visual
    x = v._embeds(images)
    states = [x]
    for block in v.transformer.resblocks:
        states.append(block(states[-1]))
    return states


def text_states(model, ids):
    m = getattr(model, "text", model)
    x = m.token_embedding(ids) + m.positional_embedding
    states = [x]
    for block in m.transformer.resblocks:
        states.append(block(states[-1], attn_mask=m.attn_mask))
    return states

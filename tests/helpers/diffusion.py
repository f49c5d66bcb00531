"""Tiny random pipelines of diffusers: Stable Diffusion 1.x, XL, 3 and Flux in shape, made on the spot."""

import torch

WORDS = "a photo of red blue green circle square on white black background large small the cat dog".split()


def tokenizer(context=12, pad="<eos>", bos=True):
    """One token a word; EOS has an id of its own, and pads, as in CLIP (or is not the pad, as in SDXL and T5)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["!", "<unk>", "<pad>", "<bos>", "<eos>"]
    vocab = {w: i for i, w in enumerate([*special[:4], *WORDS, special[4]])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    single = "<bos> $A <eos>" if bos else "$A <eos>"
    used = [(s, vocab[s]) for s in ("<bos>", "<eos>") if s in single]
    t.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    more = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token=pad, unk_token="<unk>", eos_token="<eos>", model_max_length=context, **more,
    )  # fmt: skip


def clip_text(width=32, layers=3, context=12, projection=0):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 5, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=context, hidden_act="gelu", projection_dim=projection or width,
        bos_token_id=3, eos_token_id=len(WORDS) + 4, pad_token_id=len(WORDS) + 4, initializer_range=0.2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width=24, layers=3):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(WORDS) + 5, d_model=width, d_kv=8, d_ff=32, num_layers=layers, num_heads=2)
    return T5EncoderModel(config).eval()


def vae(channels=4):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.0,
    ).eval()  # fmt: skip


def unet(cross=32, size=8, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=8, norm_num_groups=8, **more,
    ).eval()  # fmt: skip


def scheduler(kind="DDIMScheduler", **more):
    import diffusers

    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **more}
    if kind == "DDIMScheduler":
        options |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return getattr(diffusers, kind)(**options)


def sd(seed=0, **unet_options):
    """Stable Diffusion 1.x."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(), tokenizer=tokenizer(), unet=unet(**unet_options), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(seed=0, zeros=True):
    """SDXL: two encoders, the second with a pooled projection, and (``zeros``) zeros for absent negatives."""
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(seed)
    net = unet(
        32 + 48, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip_text(), text_encoder_2=clip_text(48, 4, projection=20),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(pad="!"), unet=net, scheduler=scheduler(),
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip


def sd3(seed=0):
    """SD3 without its T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=80, caption_projection_dim=32, pooled_projection_dim=24 + 20, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(),
        text_encoder=clip_text(projection=24), tokenizer=tokenizer(),
        text_encoder_2=clip_text(48, 4, projection=20), tokenizer_2=tokenizer(pad="!"),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux(seed=0):
    """Flux: T5 for context, CLIP for the pooled vector, packed latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=clip_text(), tokenizer=tokenizer(),
        text_encoder_2=t5(), tokenizer_2=tokenizer(512, pad="<pad>", bos=False), transformer=transformer,
    )  # fmt: skip
    pipe.default_sample_size = 8
    return pipe


MAKE = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}

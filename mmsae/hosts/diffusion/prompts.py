"""Prompts: through the pipeline's own ``encode_prompt``, branch by branch, and what their tokens are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmsae.hosts.diffusion.call_state import CallState
from mmsae.hosts.sites import COND, UNCOND
from mmsae.hosts.tokens import Marks
from mmsae.types import InputError

EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
SECOND = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")  # other texts for other encoders
_IMAGES = {"image", "mask_image", "control_image", "original_image", "video", "conditioning_image"}
_SHARED = ("clip_skip", "max_sequence_length")  # known to encode_prompt and to the call


def check_pipeline(pipeline: Any) -> None:
    """Refuse pipelines whose prompts we cannot encode branch by branch."""
    encode = getattr(pipeline, "encode_prompt", None)
    names = set(inspect.signature(encode).parameters) if encode else set()
    if not {"prompt", "prompt_embeds", "num_images_per_prompt"} <= names or "prompt_attention_mask" in names:
        raise InputError(
            f"{type(pipeline).__name__} is no text-to-image pipeline that is known here (Stable Diffusion 1.x, XL, 3 "
            "and Flux are): its encode_prompt takes other arguments."
        )
    if found := sorted(_IMAGES & set(inspect.signature(type(pipeline).__call__).parameters)):
        raise InputError(
            f"{type(pipeline).__name__} draws on an image that it is given ({', '.join(found)}); only pipelines that "
            "draw from text alone are hosts here (Stable Diffusion 1.x, XL, 3 and Flux)."
        )
    unet, vae = getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)
    takes = getattr(getattr(unet, "config", None), "in_channels", None)
    has = getattr(getattr(vae, "config", None), "latent_channels", None)
    if None not in (takes, has) and takes != has:
        raise InputError(
            f"{type(pipeline).__name__}: the denoiser takes {takes} channels, but latents have {has}: it was made for "
            "images as input, and only pipelines that draw from text alone are hosts here."
        )


def guided(pipeline: Any, guidance: float, negative: Any, options: Mapping[str, Any]) -> bool:
    """Whether a call of the pipeline will use negative prompts, as the pipeline itself decides it."""
    if "true_cfg_scale" in inspect.signature(type(pipeline).__call__).parameters:
        given = negative is not None or options.get("negative_prompt_embeds") is not None
        return options.get("true_cfg_scale", 1.0) > 1 and given
    if not hasattr(type(pipeline), "do_classifier_free_guidance"):
        return False
    pipeline._guidance_scale = guidance  # what the call sets first, and the property reads
    return bool(pipeline.do_classifier_free_guidance)


def encode(
    pipeline: Any,
    run: CallState,
    prompts: list[str],
    negatives: list[str] | None,
    with_negatives: bool,
    options: Mapping[str, Any],
    active: frozenset | None = None,
) -> dict[str, Tensor | None]:
    """Embeddings of prompts and negatives, each encoded in a context that is tagged with its branch.

    Args:
        pipeline: Pipeline whose ``encode_prompt`` is used, also for what it makes of absent negatives (SDXL: zeros).
        run: State of the call, which is told the branch.
        prompts: One per image.
        negatives: One per image, or None for the pipeline's default.
        with_negatives: Whether the call will use them.
        options: Arguments of the call: embeddings that are given, ``clip_skip``, ``prompt_2``, ...
        active: See :class:`CallState`.

    Returns:
        ``{name of the call's argument: tensor or None}``, all of :data:`EMBEDS`.
    """
    encoder = pipeline.encode_prompt
    names = inspect.signature(encoder).parameters
    split, pooled = "do_classifier_free_guidance" in names, "pooled_prompt_embeds" in names
    shared = {k: options[k] for k in _SHARED if k in options and k in names}
    shared |= {"device": pipeline._execution_device, "num_images_per_prompt": 1}
    empty = {k: None for k in ("prompt_2", "prompt_3") if k in names}
    off = {"do_classifier_free_guidance": False} if split else {}

    def named(out: Sequence[Any]) -> dict[str, Any]:
        keys = EMBEDS if split else EMBEDS[::2]
        keys = keys if pooled else keys[: 2 if split else 1]
        return {**dict.fromkeys(EMBEDS), **dict(zip(keys, out, strict=False))}

    def texts(prefix: str) -> dict[str, Any]:
        return {k: options.get(f"{prefix}{k}") for k in empty}

    given = {k: options[k].to(pipeline._execution_device) for k in EMBEDS if options.get(k) is not None}
    if "prompt_embeds" in given:
        found = {**dict.fromkeys(EMBEDS), **given}
    else:
        with run.encoding(COND, active):
            found = {**named(encoder(prompt=prompts, **texts(""), **off, **shared)), **given}
    if not with_negatives or "negative_prompt_embeds" in given:
        return found
    with run.encoding(UNCOND, active):
        if not split:
            out = named(encoder(prompt=negatives, **texts("negative_"), **shared))
            return {**found, EMBEDS[1]: out[EMBEDS[0]], EMBEDS[3]: out[EMBEDS[2]]}
        more = {f"negative_{k}": v for k, v in texts("negative_").items() if v is not None}
        kept = {"pooled_prompt_embeds": found["pooled_prompt_embeds"]} if pooled else {}
        out = encoder(
            prompt=None, **empty, prompt_embeds=found["prompt_embeds"], **kept, negative_prompt=negatives, **more,
            do_classifier_free_guidance=True, **shared,
        )  # fmt: skip
    negative = named(out)
    return {**found, EMBEDS[1]: negative[EMBEDS[1]], EMBEDS[3]: negative[EMBEDS[3]]}


@contextmanager
def old_name(pipeline: Any) -> Iterator[None]:
    """``text_encoder.text_model`` for pipelines that still ask for it (``clip_skip``) where transformers dropped it."""
    encoder = getattr(pipeline, "text_encoder", None)
    missing = encoder is not None and not hasattr(encoder, "text_model") and hasattr(encoder, "final_layer_norm")
    if missing:
        encoder.__dict__["text_model"] = encoder
    try:
        yield
    finally:
        if missing:
            del encoder.__dict__["text_model"]


def text_marks(tokens: Tensor, ids: Tensor, tokenizer: Any) -> Marks:
    """What the ``tokens (B, T, d)`` of a text encoder are, of which ``ids (B, T)`` are the ids by its ``tokenizer``.

    CLIP pads with its EOS token, SDXL's second encoder with ``!``: padding is what comes after the first EOS.
    """
    eos_id, pad_id, bos_id = (getattr(tokenizer, f"{n}_token_id") for n in ("eos", "pad", "bos"))
    at = torch.arange(ids.shape[1], device=ids.device)
    ends = ids == (-1 if eos_id is None else eos_id)
    last = ((ids != (-1 if pad_id is None else pad_id)) * at).amax(1)  # of tokenizers that do not end a text
    eos = torch.where(ends.any(1), ends.int().argmax(1), last)
    content = at <= eos[:, None]
    begins = (ids == (-1 if bos_id is None else bos_id)) & (at == 0)
    special = ~content | begins | (ends & content)
    return Marks(content.to(tokens.device), special.to(tokens.device), None, eos.to(tokens.device))


class PromptTokenizer:
    """Ids of a caption by all tokenizers of a pipeline, side by side; holds no weights, so that workers may have it.

    ``tokenizers`` and ``lengths`` (how many tokens the pipeline gives it) are by text encoder.
    """

    def __init__(self, tokenizers: dict[str, Any], lengths: dict[str, int]):
        self.tokenizers, self.lengths = tokenizers, lengths
        self.context_length = sum(lengths.values())

    @classmethod
    def of(cls, pipeline: Any, tokenizers: dict[str, Any]) -> PromptTokenizer:
        """A pipeline's: CLIP's context, and what its ``encode_prompt`` gives a T5."""
        parameters = inspect.signature(pipeline.encode_prompt).parameters
        t5 = parameters["max_sequence_length"].default if "max_sequence_length" in parameters else 512
        kinds = {n: getattr(getattr(pipeline, n).config, "model_type", "") for n in tokenizers}
        return cls(tokenizers, {n: t5 if kinds[n] == "t5" else int(t.model_max_length) for n, t in tokenizers.items()})

    def __call__(self, texts: list[str]) -> Tensor:
        """``(B, sum of lengths)`` int64 ids, padded and truncated as the pipeline does it."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        found = [t(list(texts), max_length=self.lengths[n], **options).input_ids for n, t in self.tokenizers.items()]
        return torch.cat([ids.long() for ids in found], 1)

    def split(self, ids: Tensor) -> dict[str, Tensor]:
        """``{text encoder: its ids (B, L)}``."""
        return dict(zip(self.lengths, ids.split(list(self.lengths.values()), 1), strict=True))

    def too_long(self, texts: list[str]) -> list[bool]:
        """Which texts lose tokens to truncation in some encoder."""
        cut = [False] * len(texts)
        for name, tokenizer in self.tokenizers.items():
            lengths = [len(ids) for ids in tokenizer(list(texts)).input_ids]
            cut = [c or n > self.lengths[name] for c, n in zip(cut, lengths, strict=True)]
        return cut

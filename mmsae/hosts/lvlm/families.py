"""What is particular to a family of vision-language models: how an image stands in a prompt, and its tokens.

Families whose images have any size, or tiles, are told by what their processors have (LLaVA, LLaVA-NeXT, Qwen-VL).
The others here give every image one square of tokens: Gemma 3, InternVL, Idefics 3 and SmolVLM. The crops and tiles
that their processors can make besides are turned off, for those have no one grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any, NamedTuple

from mmsae.types import InputError

#: Families that are hosts, in words.
KNOWN = "LLaVA, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Gemma 3, InternVL, Idefics 3 and SmolVLM"
_LLAVA = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")


class Frame(NamedTuple):
    """How an image stands in a prompt."""

    placeholder: str  #: What a prompt holds for it before the processor has seen it.
    around: int = 0  #: Characters that the processor puts there besides the image tokens.
    tokens: int | None = None  #: Tokens of every image, a square; None where they depend on the image.
    options: dict[str, Any] = {}  #: Of the processor's call.
    nested: bool = False  #: Whether the processor wants a list of images for every prompt.

    @property
    def side(self) -> int:
        """Tokens a side."""
        return isqrt(self.tokens)


def _gemma(processor: Any) -> Frame:
    token = processor.tokenizer
    around = len(processor.full_image_sequence) - processor.image_seq_length * len(token.image_token)
    return Frame(processor.boi_token, around, processor.image_seq_length, {"do_pan_and_scan": False}, True)


def _internvl(processor: Any) -> Frame:
    around = len(processor.start_image_token) + len(processor.end_image_token)
    return Frame(processor.image_token, around, processor.image_seq_length, {"crop_to_patches": False})


def _idefics(processor: Any) -> Frame:
    whole = getattr(processor, "global_image_token", None) or processor.global_image_tag
    around = 2 * len(processor.fake_image_token) + len(whole)
    return Frame(processor.image_token, around, processor.image_seq_len, {"do_image_splitting": False}, True)


_FRAMES: dict[str, Callable[[Any], Frame]] = {
    "Gemma3Processor": _gemma,
    "InternVLProcessor": _internvl,
    "Idefics3Processor": _idefics,
    "SmolVLMProcessor": _idefics,
}


def is_qwen(processor: Any) -> bool:
    """Whether images have any size, in patches that are merged (``image_grid_thw``)."""
    return hasattr(getattr(processor, "image_processor", None), "merge_size")


def is_llava(processor: Any) -> bool:
    """Whether it is of LLaVA or LLaVA-NeXT."""
    return all(hasattr(processor, f) for f in _LLAVA)


def frame(processor: Any, image_token: str) -> Frame:
    """How images stand in the prompts of a processor.

    Args:
        processor: Of transformers.
        image_token: The token that images become, which is their placeholder in families that are not named here.
    """
    made = _FRAMES.get(type(processor).__name__)
    return Frame(image_token) if made is None else made(processor)


def check_family(processor: Any, model: Any, name: str) -> None:
    """Refuse families whose image tokens cannot be placed here."""
    known = type(processor).__name__ in _FRAMES or is_qwen(processor) or is_llava(processor)
    if not known or getattr(model.config, "vision_config", None) is None:
        raise InputError(
            f"host {name} is of the family {model.config.model_type} ({type(processor).__name__}), which is not known "
            f"here: {KNOWN} are."
        )


def squares(processor: Any, model: Any) -> dict[str, tuple[Any, Any]]:
    """What processor and model have to agree in, where every image is a square: ``{field: (processor's, model's)}``."""
    config, vision = model.config, model.config.vision_config
    frame_ = frame(processor, "")
    if frame_.tokens is None:
        return {}
    side = _first(vision.image_size) // _first(vision.patch_size)
    if (own := getattr(config, "mm_tokens_per_image", None)) is None:
        ratio = getattr(config, "downsample_ratio", None)
        own = int((side * ratio if ratio else side / config.scale_factor) ** 2)
    size = getattr(processor.image_processor, "max_image_size", None) or processor.image_processor.size
    longest = next((size[k] for k in ("longest_edge", "height") if size.get(k)), None)
    return {"image tokens of an image": (frame_.tokens, own), "size": (longest, _first(vision.image_size))}


def _first(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]

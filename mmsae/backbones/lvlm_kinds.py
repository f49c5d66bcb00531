"""What the tokens of a vision-language sequence are, and which of them a site's rows are.

Kinds are read from the processor's own output: image tokens from its image token id, padding from its attention mask,
special tokens from its tokenizer, question and answer from character offsets. Nothing is counted from a constant.

Token policies of LVLM sites (rows in order of item and position):
    image: Image tokens; line-break tokens (LLaVA-NeXT) are among them and flagged as special.
    text: Content tokens: question and answer, and what is generated; no special, template or padding tokens.
    text_all: Text tokens without padding; special and template tokens are among them and flagged.
    all: Image and text tokens, without padding.
    image_mean: One row per item with an image, the mean of ``image``.
    text_mean: One row per item, the mean of ``text_all`` after the last image (VL-SAE's text vector).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.types import IMAGE, TEXT

PAD, SPECIAL, TEMPLATE, QUESTION, ANSWER, PATCH, BREAK = range(7)

#: ``{policy: modality of the site}``; a site of ``all`` is of the sequence, which is the language model's.
POLICIES = {"image": IMAGE, "text": TEXT, "text_all": TEXT, "all": TEXT, "image_mean": IMAGE, "text_mean": TEXT}
MEANS = ("image_mean", "text_mean")


class Vocabulary(NamedTuple):
    """The token ids that are no words.

    Attributes:
        image: Id of the image token.
        special: Ids of special tokens (BOS, EOS, padding, role marks), without ``<unk>``, which stands for a word.
    """

    image: int
    special: tuple[int, ...]

    def classify(self, ids: Tensor, content: int = QUESTION) -> Tensor:
        """``(B, T) uint8`` kinds as far as ids tell them: PATCH, SPECIAL, and ``content`` for everything else."""
        kinds = torch.full_like(ids, content, dtype=torch.uint8)
        kinds[torch.isin(ids, torch.tensor(self.special, device=ids.device))] = SPECIAL
        kinds[ids == self.image] = PATCH
        return kinds

    @classmethod
    def of(cls, tokenizer: object, image: int, more: Collection[int] = ()) -> Vocabulary:
        """From a tokenizer of transformers."""
        keep = {getattr(tokenizer, "unk_token_id", None)} - {tokenizer.eos_token_id, tokenizer.pad_token_id}
        added = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
        return cls(image, tuple(sorted({*tokenizer.all_special_ids, *added, *more} - keep)))


class Span(NamedTuple):
    """The tokens of one forward call.

    Attributes:
        kinds: ``(B, T) uint8``.
        position: ``(B, T)`` place in the item's own sequence, padding not counted.
        start: Tokens before these that the call finds in the cache; 0 in a prefill.
    """

    kinds: Tensor
    position: Tensor
    start: int


def span_of(ids: Tensor, attention: Tensor | None, start: int, vocabulary: Vocabulary, known: Tensor | None) -> Span:
    """What the tokens of a call are.

    Args:
        ids: ``(B, T)`` token ids of the call.
        attention: ``(B, start + T)`` 0 for padding; None where the call has none of that form.
        start: Tokens in the cache.
        vocabulary: Of the host.
        known: ``(b, L)`` kinds of the batch that the call is about; ``B`` is a multiple of ``b`` (beams). Tokens
            beyond L were generated: content, unless special.
    """
    n = ids.shape[1]
    kinds = vocabulary.classify(ids, QUESTION if known is None else ANSWER)
    if known is not None and start < known.shape[1]:
        seen = known[:, start : start + n].to(kinds.device)
        kinds[:, : seen.shape[1]] = seen.repeat_interleave(len(ids) // len(known), 0)
    if attention is None or attention.shape != (len(ids), start + n):
        return Span(kinds, torch.arange(start, start + n, device=ids.device).expand_as(ids), start)
    attention = attention.to(kinds.device)
    kinds[attention[:, start:] == 0] = PAD
    return Span(kinds, (attention.long().cumsum(1) - 1).clamp(min=0)[:, start:], start)


def select(policy: str, kinds: Tensor) -> Tensor:
    """``(B, T) bool``: the tokens that a policy takes (the means: which ones they average)."""
    image, text = kinds >= PATCH, (kinds != PAD) & (kinds < PATCH)
    if policy in ("image", "image_mean"):
        return image
    if policy == "text":
        return (kinds == QUESTION) | (kinds == ANSWER)
    if policy == "text_all":
        return text
    if policy == "text_mean":
        return text & (image.flip(1).cumsum(1).flip(1) == 0)
    return kinds != PAD


def flagged(kinds: Tensor) -> Tensor:
    """``bool``: special and template tokens, and line breaks, which no content is at."""
    return (kinds == SPECIAL) | (kinds == TEMPLATE) | (kinds == BREAK)

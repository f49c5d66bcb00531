"""What the tokens of a vision-language sequence are, which of them a policy takes, and means over those seen so far.

Policies: ``image``, ``text`` (question and answer), ``text_all`` (template too), ``all``, and the means ``image_mean``
and ``text_mean`` (text behind the last image).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.sites import Where
from mmsae.types import IMAGE, ROLES, TEXT, InputError

PAD, SPECIAL, TEMPLATE, QUESTION, ANSWER, PATCH, BREAK = range(len(ROLES))  # in their order

#: ``{policy: modality of the site}``; a site of ``all`` is of the sequence, which is the language model's.
POLICIES = {"image": IMAGE, "text": TEXT, "text_all": TEXT, "all": TEXT, "image_mean": IMAGE, "text_mean": TEXT}
MEANS = ("image_mean", "text_mean")


class Vocabulary(NamedTuple):
    """The token ids that are no words."""

    image: int  #: Id of the image token.
    special: tuple[int, ...]  #: Special tokens (BOS, padding, role marks, ...); ``<unk>`` stands for a word.

    def classify(self, ids: Tensor, content: int = QUESTION) -> Tensor:
        """``(B, T) uint8`` kinds as far as ids tell them: PATCH, SPECIAL, and ``content`` for everything else."""
        kinds = torch.full_like(ids, content, dtype=torch.uint8)
        kinds[torch.isin(ids, torch.tensor(self.special, device=ids.device))] = SPECIAL
        kinds[ids == self.image] = PATCH
        return kinds

    @classmethod
    def of(cls, tokenizer: object, image: int, more: Collection[int] = ()) -> Vocabulary:
        """Read the vocabulary of a tokenizer of transformers."""
        keep = {getattr(tokenizer, "unk_token_id", None)} - {tokenizer.eos_token_id, tokenizer.pad_token_id}
        added = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
        return cls(image, tuple(sorted({*tokenizer.all_special_ids, *added, *more} - keep)))


def kinds_of(
    ids: Tensor, attention: Tensor | None, start: int, vocabulary: Vocabulary, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the tokens of a call are, ``(B, T) uint8``, and their places ``(B, T)``, for which padding does not count.

    Args:
        ids: ``(B, T)`` token ids of the call.
        attention: ``(B, start + T)`` 0 for padding; None where the call has none of that form.
        start: Tokens in the cache.
        vocabulary: The host's.
        known: ``(b, L)`` kinds of the batch that the call is about; ``B`` is a multiple of ``b`` (beams). Tokens
            beyond L were generated: content, unless special.
    """
    n = ids.shape[1]
    kinds = vocabulary.classify(ids, QUESTION if known is None else ANSWER)
    if known is not None and start < known.shape[1]:
        seen = known[:, start : start + n].to(kinds.device)
        kinds[:, : seen.shape[1]] = seen.repeat_interleave(len(ids) // len(known), 0)
    if attention is None or attention.shape != (len(ids), start + n):
        return kinds, torch.arange(start, start + n, device=ids.device).expand_as(ids)
    attention = attention.to(kinds.device)
    kinds[attention[:, start:] == 0] = PAD
    return kinds, (attention.long().cumsum(1) - 1).clamp(min=0)[:, start:]


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


class PickedMeans(NamedTuple):
    """Rows that are means over all tokens of an item so far (see :class:`~mmsae.hosts.capture.Picked`).

    A new mean shifts the averaged tokens of this call.
    """

    tokens: Tensor
    where: Where
    keep: Tensor  #: ``(B, T)`` which tokens are averaged.
    rows: Tensor  #: ``(N, d)`` the means.

    def take(self) -> Tensor:
        """The means."""
        return self.rows

    def put(self, old: Tensor, new: Tensor) -> Tensor:
        """The tokens, shifted by the change of their means."""
        b, _, d = self.tokens.shape
        shift = self.tokens.new_zeros(b, d).index_copy(0, self.where.item, (new - old).to(self.tokens))
        return self.tokens + shift[:, None] * self.keep.to(self.tokens)[..., None]


class MeansSoFar:
    """Sums over the tokens of each item that a mean has seen, so that decoding with a cache knows the whole mean."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count: Tensor | float = 0.0
        self.seen = (0, 0)  # items and tokens

    def add(self, tokens: Tensor, keep: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """``(B, d)`` means over the item's tokens so far, and ``(B,) bool`` whose tokens are among these.

        A cache with tokens that were not seen here is refused, for the mean is not known then.
        """
        w = keep.to(tokens)
        total, count = torch.einsum("bt,btd->bd", w, tokens), w.sum(1)
        if start:
            if self.seen != (len(tokens), start):
                raise InputError(
                    f"a mean over tokens needs all of them: the cache holds {start} of each of {len(tokens)} items, "
                    f"{self.seen[1]} of {self.seen[0]} were seen since the edit was opened."
                )
            total, count = total + self.total, count + self.count
        self.total, self.count, self.seen = total, count, (len(tokens), start + tokens.shape[1])
        return total / count.clamp(min=1)[:, None], keep.any(1)

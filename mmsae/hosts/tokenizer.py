"""The host's own tokenizer, with the two questions that the rest of the package asks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HostTokenizer:
    """Calls an open_clip tokenizer; holds no weights, so that workers may have a copy.

    Args:
        tokenizer: ``tokenizer(list[str], context_length=L) -> (B, L)`` token ids, truncating.
        context_length: L.
    """

    def __init__(self, tokenizer: Callable[..., Tensor], context_length: int):
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """``(B, L)`` int64 ids; longer texts are truncated as the host does it."""
        return self.tokenizer(list(texts), context_length=self.context_length).long()

    def too_long(self, texts: list[str]) -> list[bool]:
        """Which texts lose tokens to truncation.

        Asked of any tokenizer alike: with one more place, does the text change, or fill that place?
        """
        n, more = self.context_length, self.tokenizer([*texts, ""], context_length=self.context_length + 1)
        last = n - 1 if getattr(self.tokenizer, "tokenizer_mode", "") == "clips" else n  # CLIPS ends with a class token
        longer, pad = more[:-1], more[-1, -1]
        changed = (longer[:, :last] != self(texts)[:, :last]).any(1)
        return torch.logical_or(changed, longer[:, n] != pad).tolist()

    @property
    def _inner(self) -> Any:
        """The tokenizer of transformers inside open_clip's wrapper, or open_clip's own."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    def special_ids(self) -> list[int]:
        """Ids of BOS, EOS, class and separator tokens; ``<unk>`` stands for a word and is not among them."""
        unknown, eos = getattr(self._inner, "unk_token_id", None), self.eos_id()
        return [i for i in getattr(self._inner, "all_special_ids", []) if i != unknown or i == eos]

    def pad_id(self) -> int | None:
        """Id of the padding token; None where the tokenizer does not name one."""
        return getattr(self._inner, "pad_token_id", None)

    def eos_id(self) -> int | None:
        """Id of the token that ends a text; None where the tokenizer does not name one."""
        return getattr(self._inner, "eot_token_id", getattr(self._inner, "eos_token_id", None))

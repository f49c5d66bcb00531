"""The host's own tokenizer, with the two questions that the rest of the package asks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
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
        own = self(texts)
        if getattr(self._inner, "padding_side", "right") == "left":
            own, more = own.flip(1), more.flip(1)
        longer, pad = more[:-1], more[-1, -1]
        changed = (longer[:, :last] != own[:, :last]).any(1)
        return torch.logical_or(changed, longer[:, n] != pad).tolist()

    @property
    def _inner(self) -> Any:
        """The tokenizer of transformers inside open_clip's wrapper, or open_clip's own."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Tokens as they read, see :func:`token_pieces`."""
        return token_pieces(self._inner, ids)

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


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens of one text as they read, each with the white space before it.

    Args:
        tokenizer: A tokenizer of transformers, or open_clip's own.
        ids: Ids in the order of the text.
    """
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        raw = [str(p) for p in tokenizer.convert_ids_to_tokens(list(ids))]
    else:
        raw = [str(tokenizer.decoder.get(i, "")) for i in ids]
    if any("</w>" in p for p in raw):  # CLIP: marks ends of words
        ends = [True, *(p.endswith("</w>") for p in raw)]
        return [" " * end + _from_bytes(p.removesuffix("</w>")) for end, p in zip(ends[:-1], raw, strict=True)]
    if any("▁" in p for p in raw):  # sentencepiece
        return [p.replace("▁", " ") for p in raw]
    if any("Ġ" in p for p in raw):  # GPT-2: bytes as printable letters
        return [_from_bytes(p) for p in raw]
    return [p.removeprefix("##") if p.startswith("##") else f" {p}" for p in raw]  # whole words; BERT


@cache
def _byte_of() -> dict[str, int]:
    """The bytes that the letters of byte-level tokenizers stand for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _from_bytes(piece: str) -> str:
    table = _byte_of()
    if any(c not in table for c in piece):
        return piece
    return bytes(table[c] for c in piece).decode("utf-8", errors="replace")

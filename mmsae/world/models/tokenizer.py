"""A word-level tokenizer whose vocabulary is the words of a data set's captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mmsae.errors import InputError
from mmsae.world.models.options import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST, SHORTEST = 40, 16  # bounds of the context length where it is taken from the captions
PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
_WORD = re.compile(r"\w+|[^\w\s]+")  # what the tokenizer's Whitespace splitter does


def clean(caption: str) -> str:
    """Mended encoding and entities, as open_clip does before it tokenises; plain ASCII passes (ftfy is slow)."""
    if caption.isascii() and "&" not in caption:
        return caption
    from open_clip.tokenizer import basic_clean

    return basic_clean(caption)


def words_of(caption: str) -> list[str]:
    """The tokens of a caption: lower-case words, and runs of punctuation."""
    return _WORD.findall(clean(caption).lower())


def vocabulary(captions: Iterable[str], max_words: int = 20_000) -> list[str]:
    """The most frequent words, most frequent first, equals in alphabetical order.

    Raises:
        InputError: No caption has a word.
    """
    counts = Counter(w for c in captions for w in words_of(c))
    words = sorted(counts, key=lambda w: (-counts[w], w))[:max_words]
    if not words:
        raise InputError("the captions hold no word to make a vocabulary of")
    return words


class Words(NamedTuple):
    """What a text encoder knows of some captions."""

    words: list[str]  #: The vocabulary
    context_length: int  #: Tokens of a text
    too_long: int  #: Number of captions that lose their last words

    @classmethod
    def of(cls, captions: Sequence[str], options: Texts) -> Words:
        """Those of different captions."""
        words, longest = vocabulary(captions, options.max_words), [len(words_of(t)) for t in captions]
        length = options.context_length or min(max(*longest, SHORTEST - 1) + 1, LONGEST)
        return cls(words, length, sum(n >= length for n in longest))


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that ``AutoTokenizer`` (and with it open_clip) loads from where it is saved.

    Ids: ``<pad>`` 0, ``<unk>`` 1, the words, and ``<eos>`` the highest, because open_clip takes a text's embedding at
    the largest id; it is never 2, which transformers' CLIP reads as "old checkpoint". A caption longer than the
    context loses its last words and keeps ``<eos>``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate([PAD, UNK, *words, EOS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, vocab[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNK, eos_token=EOS, padding_side="right"
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str], context_length: int) -> Tensor:
    """``(n, context_length) int64``, as open_clip's ``HFTokenizer`` makes them."""
    return tokenizer(
        [clean(t) for t in texts], return_tensors="pt", max_length=context_length, padding="max_length", truncation=True
    ).input_ids

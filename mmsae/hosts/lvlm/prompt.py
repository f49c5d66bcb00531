"""Samples to the inputs of a vision-language model: prompt, processor, and what every token is.

Holds the processor and no weights, so that workers may have a copy.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.lvlm.families import frame
from mmsae.hosts.lvlm.image_grid import layouts, place
from mmsae.hosts.lvlm.tokens import ANSWER, BREAK, PAD, PATCH, QUESTION, TEMPLATE, Vocabulary
from mmsae.types import Faults, ImageTextBatch, InputError

TextChoice = Literal["question", "question+answer"]
_Q, _A = "\ue000", "\ue001"  # stand for question and answer while the template is rendered, without anybody's text
_OWN = ("offset_mapping", "text_starts")


class Template(NamedTuple):
    """A prompt around what is said."""

    before: str  #: Ahead of the question.
    between: str  #: From there to the answer, or to the end where there is none.
    after: str | None  #: Behind the answer; None where the answer's turn is open.

    def fill(self, question: str, answer: str | None) -> str:
        """The prompt; what is said is put in once and never looked at, so it may hold any character."""
        return self.before + question + self.between + ("" if self.after is None else (answer or "") + self.after)

    def spans(self, question: str, answer: str | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where question and answer stand in the prompt, as characters."""
        start = len(self.before)
        end = start + len(question)
        if self.after is None:
            return (start, end), (0, 0)
        return (start, end), (end + len(self.between), end + len(self.between) + len(answer or ""))


def said(value: Any) -> str | None:
    """A field of json as text, None where it says nothing: a list's first entry, numbers and truth values as json."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if isinstance(value, str):
        return value.strip() or None
    return None if value is None else json.dumps(value, ensure_ascii=False)


class Collator:
    """Makes batches of an LVLM host.

    Args:
        processor: A processor of transformers, with a fast tokenizer.
        vocabulary: The host's.
        context_length: Tokens of a sequence, image tokens included; longer text loses its last words, images none.
        text: ``question``: the prompt alone, from json's ``question`` or else the caption, with the answer's turn
            empty. ``question+answer``: with json's ``answer`` in that turn, where there is one.
        padding_side: Side on which shorter prompts are padded; ``left`` is what generation needs.
    """

    need = ("image", "question")  # of a sample, in the words of mmsae.shards.read_shard

    def __init__(
        self,
        processor: Any,
        vocabulary: Vocabulary,
        context_length: int,
        text: TextChoice = "question",
        padding_side: Literal["left", "right"] = "left",
    ):
        if text not in ("question", "question+answer"):
            raise InputError(f"text {text!r} is neither 'question' nor 'question+answer'.")
        self.processor, self.vocabulary, self.context_length = processor, vocabulary, context_length
        self.text, self.padding_side = text, padding_side
        self.image_token = processor.tokenizer.convert_ids_to_tokens(vocabulary.image)
        self._frame = frame(processor, self.image_token)
        self._special = _special_tokens(processor, self.image_token)
        self._templates: dict[tuple[int, bool], Template] = {}

    def limited(self, max_tokens: int) -> Collator:
        """The same for sequences of at most so many tokens."""
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
        other = copy.copy(self)
        other.context_length = min(self.context_length, max_tokens)
        return other

    def __call__(self, samples: Sequence[Any]) -> ImageTextBatch:
        """A batch of samples (:class:`mmsae.shards.Sample`: image or list of images or None, caption, meta)."""
        answered = self.text == "question+answer"
        questions = [said(s.meta.get("question")) or s.caption for s in samples]
        answers = [said(s.meta.get("answer")) if answered else None for s in samples]
        images, *about = ([getattr(s, f) for s in samples] for f in ("image", "uid", "caption", "key", "shard"))
        return self.batch(questions, images, answers, *about)

    def batch(
        self,
        questions: Sequence[str],
        images: Sequence[Any],
        answers: Sequence[str | None] | None = None,
        uids: Sequence[str] | None = None,
        captions: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
        shards: Sequence[str] | None = None,
    ) -> ImageTextBatch:
        """A batch of ``B`` prompts.

        Args:
            questions: What the user says.
            images: One PIL image, a list of them, or None for each.
            answers: What stands in the answer's turn; None leaves it open.
            uids: Default: their numbers.
            captions: Default: the questions.
            keys: Default: the uids.
            shards: Default: empty.

        Returns:
            A batch with ``inputs``: the processor's tensors and ``kinds (B, L)`` (see ``lvlm.tokens``). Its faults are
            texts cut (``long_caption``) and texts that name tokens of the host, taken out (``special_token``).
        """
        n = len(questions)
        several = [list(i) if isinstance(i, (list, tuple)) else [i] * (i is not None) for i in images]
        answers = [None] * n if answers is None else list(answers)
        uids = [str(i) for i in range(n)] if uids is None else list(uids)
        keys, shards = list(uids if keys is None else keys), [""] * n if shards is None else list(shards)
        texts = [(self._plain(q), a if a is None else self._plain(a)) for q, a in zip(questions, answers, strict=True)]
        named = [self._special.findall(f"{q} {a or ''}") for q, a in zip(questions, answers, strict=True)]
        inputs, cut = self._encode(texts, several), set()
        while (inputs["attention_mask"].sum(1) > self.context_length).any():
            texts, over = self._shorten(texts, inputs, [f"{s} {k}".strip() for s, k in zip(shards, keys, strict=True)])
            cut |= over
            inputs = self._encode(texts, several)
        detail = f"more than {self.context_length} tokens"
        notes = [("long_caption", shards[i], keys[i], detail) for i in sorted(cut)]
        notes += [("special_token", shards[i], keys[i], ", ".join(dict.fromkeys(t))) for i, t in enumerate(named) if t]
        faults = Faults(0, dict(Counter(kind for kind, *_ in notes)), tuple(notes))
        inputs = {k: v for k, v in inputs.items() if k not in _OWN}
        captions = list(questions if captions is None else captions)
        return ImageTextBatch(None, inputs["input_ids"], uids, captions, keys, shards, faults, inputs)

    def prompt(self, question: str, answer: str | None = None, images: int = 1) -> str:
        """The text of a prompt: the processor's chat template where it has one, else LLaVA's."""
        return self._template(images, answer is not None).fill(question, answer)

    def _plain(self, text: str) -> str:
        """Without the host's own tokens, which only the template may place, and without outer white space."""
        return self._special.sub(" ", text).strip()

    def _template(self, images: int, answered: bool) -> Template:
        if (images, answered) not in self._templates:
            before, rest = self._render(images, answered).split(_Q)
            parts = rest.split(_A) if answered else (rest, None)
            self._templates[images, answered] = Template(before, *parts)
        return self._templates[images, answered]

    def _render(self, images: int, answered: bool) -> str:
        tokenizer = self.processor.tokenizer
        if getattr(self.processor, "chat_template", None):
            said = [{"type": "image"}] * images + [{"type": "text", "text": _Q}]
            messages = [{"role": "user", "content": said}]
            if answered:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": _A}]})
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
            if text.count(_Q) == 1 and text.count(_A) == answered:
                return text
            raise InputError("the processor's chat template does not show the user's text exactly once.")
        end = f" {_A}{tokenizer.eos_token or ''}" if answered else ""
        return "USER: " + f"{self._frame.placeholder}\n" * images + _Q + " ASSISTANT:" + end

    def _encode(self, texts: list[tuple[str, str | None]], images: list[list[Any]]) -> dict[str, Tensor]:
        """The processor's tensors, ``kinds``, ``offset_mapping`` and where question and answer start in it."""
        templates = [self._template(len(i), a is not None) for (_, a), i in zip(texts, images, strict=True)]
        prompts = [t.fill(*pair) for t, pair in zip(templates, texts, strict=True)]
        bos = self.processor.tokenizer.bos_token
        flat = [image for several in images for image in several]
        encoded = self.processor(
            text=prompts,
            images=(images if self._frame.nested else flat) if flat else None,
            return_tensors="pt",
            padding=True,
            padding_side=self.padding_side,
            truncation=False,
            return_offsets_mapping=True,
            add_special_tokens=not (bos and prompts[0].startswith(bos)),  # a template that writes BOS itself
            **(self._frame.options if flat else {}),
        )
        inputs = {k: v for k, v in dict(encoded).items() if isinstance(v, Tensor)}
        kinds = self.vocabulary.classify(inputs["input_ids"], TEMPLATE)
        kinds[inputs["attention_mask"] == 0] = PAD
        is_image = kinds == PATCH
        more = self._frame.around - len(self._frame.placeholder)  # characters of an image besides its tokens
        grown = is_image.sum(1) * len(self.image_token) + more * torch.tensor([len(i) for i in images])
        begin, end = inputs["offset_mapping"].unbind(-1)
        spans = torch.tensor([t.spans(*pair) for t, pair in zip(templates, texts, strict=True)])  # (B, 2, 2)
        spans += grown[:, None, None]
        for kind, (first, last) in zip((QUESTION, ANSWER), spans.permute(1, 2, 0), strict=True):
            kinds[(begin < last[:, None]) & (end > first[:, None]) & (kinds == TEMPLATE) & (begin < end)] = kind
        for image in place(is_image, inputs["attention_mask"], layouts(self.processor, inputs)):
            columns = is_image[image.item].nonzero()[:, 0]
            offset = int((inputs["attention_mask"][image.item] == 0).sum()) if self.padding_side == "left" else 0
            breaks = image.start + image.layout.breaks + offset
            assert not len(breaks) or torch.isin(breaks, columns).all()
            kinds[image.item, breaks] = BREAK
        return inputs | {"kinds": kinds, "text_starts": spans[..., 0]}

    def _shorten(
        self, texts: list[tuple[str, str | None]], inputs: Mapping[str, Tensor], names: list[str]
    ) -> tuple[list[tuple[str, str | None]], set[int]]:
        """The texts without their last words, where a sequence is longer than the context."""
        length, out, cut = inputs["attention_mask"].sum(1), list(texts), set()
        for i in (length > self.context_length).nonzero()[:, 0].tolist():
            kinds, over = inputs["kinds"][i], int(length[i]) - self.context_length
            content = ((kinds == QUESTION) | (kinds == ANSWER)).nonzero()[:, 0]
            if over > len(content):
                raise InputError(
                    f"{names[i]}: image tokens and template take {int(length[i]) - len(content)} tokens, but the host's"
                    f" context holds {self.context_length}."
                )
            question, answer = texts[i]
            for kind in (ANSWER, QUESTION):  # the answer comes last and loses its end first
                own = content[kinds[content] == kind]
                gone = min(over, len(own))
                if gone:
                    at = int(inputs["offset_mapping"][i, own[-gone], 0] - inputs["text_starts"][i, kind - QUESTION])
                    kept = (answer if kind == ANSWER else question)[: max(0, at)].rstrip()
                    question, answer = (question, kept) if kind == ANSWER else (kept, answer)
                    over -= gone
            out[i] = question, answer
            cut.add(i)
        return out, cut


def _special_tokens(processor: Any, image_token: str) -> re.Pattern:
    """What finds the tokens that mean something to a host: special ones, and added ones that look like markup."""
    tokenizer = processor.tokenizer
    own = {t for n, t in vars(processor).items() if n.endswith("_token") and isinstance(t, str)}
    own |= {image_token, *tokenizer.all_special_tokens}
    any_case = set()
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or re.fullmatch(r"[<\[|].*[>\]|]", token.content):
            (any_case if token.normalized else own).add(token.content)

    def either(tokens: set[str]) -> str:
        return "|".join(re.escape(t) for t in sorted(tokens, key=lambda t: (-len(t), t)) if t.strip()) or "(?!)"

    return re.compile(f"{either(own)}|(?i:{either(any_case - own)})")

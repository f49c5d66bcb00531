"""What a language or vision-language model is asked: one interface, whoever answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmsae.types import InputError


class Message(NamedTuple):
    """One turn."""

    role: str  #: ``system``, ``user`` or ``assistant``
    text: str  #: What is said; images stand before it
    images: tuple[bytes, ...] = ()  #: Encoded images: PNG, JPEG or WebP

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        images = [base64.b64encode(i).decode() for i in self.images]
        return {"role": self.role, "text": self.text, "images": images}


class Reply(NamedTuple):
    """What came back."""

    text: str  #: The answer
    tokens_in: int = 0  #: Tokens of the question, where they are known
    tokens_out: int = 0  #: Tokens of the answer


class NoReply(RuntimeError):
    """A model gave no answer: it timed out, broke down, or refused.

    Attributes:
        again: Whether it may answer when it is asked again.
        after: Seconds that it asked to wait, or 0.
    """

    def __init__(self, why: str, again: bool = True, after: float = 0.0):
        super().__init__(why)
        self.again, self.after = again, after


class Client:
    """A model that can be asked. Subclasses answer what they can; the rest is refused in one sentence.

    Attributes:
        name: Which model, as names and scores record it.
        params: What else decides its answers.
        identity: Which model that name means here: the address of its server, the fingerprint of its weights, the code
            of a function. Two of one name are two models, and the answers of one are not the other's. Plain JSON
            values; it is asked for where answers are kept.
        parallel: Whether several questions may be asked at once.
        chats: Whether it answers questions.
        scores: Whether it is known to give log-probabilities of texts; else they are asked for where a scorer that
            needs them is named.
    """

    name: str = ""
    params: Mapping[str, Any] = {}
    identity: Mapping[str, str] = {}
    parallel: bool = False
    chats: bool = True
    scores: bool = False

    def chat(self, messages: Sequence[Message]) -> Reply:
        """The answer to a conversation.

        Raises:
            NoReply: There is none.
        """
        raise InputError(f"client {self.name} answers no questions")

    def score(self, prefix: str, continuation: str) -> np.ndarray:
        """``(t,)`` log-probabilities, in nats, of the t tokens of a continuation after a prefix.

        Raises:
            NoReply: There is no answer.
        """
        raise InputError(f"client {self.name} gives no log-probabilities of a text")

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """``(n, width)`` unit embeddings of texts."""
        raise InputError(f"client {self.name} gives no embeddings")

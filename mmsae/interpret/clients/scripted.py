"""A client that a function answers for: rules instead of a model, for tests and for judges that know the truth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np

from mmsae.interpret.clients.client import Client, Message, Reply
from mmsae.types import InputError


class ScriptedClient(Client):
    """Answers by functions.

    Args:
        chat: ``messages -> text``; it may raise :class:`~mmsae.interpret.clients.client.NoReply`.
        score: ``(prefix, continuation) -> log-probabilities``.
        embed: ``texts -> (n, width)``.
        name: What names and scores record.
    """

    parallel = True

    def __init__(
        self,
        chat: Callable[[Sequence[Message]], str] | None = None,
        score: Callable[[str, str], Sequence[float]] | None = None,
        embed: Callable[[Sequence[str]], np.ndarray] | None = None,
        name: str = "script",
    ):
        self.chats, self.scores = chat is not None, score is not None
        self.name, self._chat, self._score, self._embed, self.calls = name, chat, score, embed, 0

    @classmethod
    def of(cls, spec: str) -> ScriptedClient:
        """By ``MODULE:FUNCTION``, a function of messages, or ``MODULE:CLIENT``, a client.

        Raises:
            InputError: There is no such thing.
        """
        module, _, name = spec.partition(":")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise InputError(f"client script:{spec} is no MODULE:FUNCTION that can be imported: {e}") from e
        made = found if isinstance(found, Client) else cls(found, name=spec)
        if isinstance(made, ScriptedClient) and (file := getattr(import_module(module), "__file__", None)):
            made.identity = {"code": hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()}
        return made

    def chat(self, messages: Sequence[Message]) -> Reply:
        self.calls += 1
        if self._chat is None:
            return super().chat(messages)
        text = self._chat(messages)
        words = sum(len(m.text.split()) for m in messages)
        return Reply(text, words, len(text.split()))

    def score(self, prefix: str, continuation: str) -> np.ndarray:
        self.calls += 1
        return (
            super().score(prefix, continuation) if self._score is None else np.array(self._score(prefix, continuation))
        )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return super().embed(texts) if self._embed is None else self._embed(texts)

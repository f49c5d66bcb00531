"""Questions that are asked once: answers are kept on disk by what was asked, failures are tried again, counted, and
gone past.

A killed run, or one that is repeated, asks only what has no answer yet. What a model answered is kept word for word.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmsae.files import write_whole
from mmsae.interpret.clients.client import Client, Message, NoReply
from mmsae.interpret.clients.options import Asking
from mmsae.types import InputError

FIRST_WAIT = 1.0  # seconds before a question is asked again
DEAD = 5  # questions that found nobody, none answered, after which a model counts as away


class Asked:
    """A client with a memory, patience and an account.

    Args:
        client: Whom to ask.
        cache: Folder of answers; None keeps none.
        asking: Concurrency, retries and prices.
        sleep: How to wait, for tests.

    Attributes:
        counts: ``new``, ``cached``, ``failed``, ``nonsense`` (answers that could not be read, empty ones too),
            ``abstained`` (answers that there is nothing), ``retried``, ``tokens_in``, ``tokens_out``, of this run.
        reasons: Why questions got no answer, the first of each kind.
    """

    def __init__(
        self,
        client: Client,
        cache: Path | None = None,
        asking: Asking = Asking(),
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.client, self.cache, self.asking, self.sleep = client, cache, asking, sleep
        self.counts: Counter[str] = Counter()
        self.reasons: dict[str, int] = {}
        self.away = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.client.name

    @property
    def account(self) -> dict[str, Any]:
        """Calls, tokens, cost, and what failed."""
        keys = ("new", "cached", "failed", "nonsense", "abstained", "retried", "tokens_in", "tokens_out")
        c, a = {k: self.counts[k] for k in keys}, self.asking
        cost = (c["tokens_in"] * a.price_in + c["tokens_out"] * a.price_out) / 1e6
        return {"client": self.name, **c, "cost": cost, "reasons": dict(self.reasons)}

    @property
    def told(self) -> str:
        """The account as a sentence."""
        said = (
            "{client}: {new} questions, {cached} known before; {failed} had no answer, {nonsense} one that cannot be "
        )
        return (said + "read, {abstained} one that there is nothing; cost {cost:.2f}").format(**self.account)

    def chat(
        self, questions: Sequence[Sequence[Message]], done: Callable[[], object] = lambda: None
    ) -> list[str | None]:
        """Answers in the order of the questions, None where there is none or an empty one; ``done`` is called after
        each new one.
        """

        def ask(messages: Sequence[Message]) -> dict[str, Any]:
            return self.client.chat(messages)._asdict()

        requests = [{"chat": [m.to_dict() for m in q]} for q in questions]
        found = self._all(requests, ask, questions, done)
        out = [None if said is None or not said["text"].strip() else said["text"] for said in found]
        for _ in range(sum(text is None and said is not None for text, said in zip(out, found, strict=True))):
            self.count_nonsense()
        return out

    def score(self, pairs: Sequence[tuple[str, str]], done: Callable[[], object] = lambda: None) -> list[Any]:
        """Log-probabilities of continuations after prefixes, None where there is no answer."""

        def ask(pair: tuple[str, str]) -> dict[str, Any]:
            return {"logprobs": self.client.score(*pair).tolist()}

        found = self._all([{"score": list(p)} for p in pairs], ask, pairs, done)
        return [None if said is None else said["logprobs"] for said in found]

    def once(self, request: dict[str, Any], call: Callable[[], Any]) -> Any:
        """What ``call`` has to say to a request that is no conversation, kept and counted as answers are.

        Args:
            request: All that decides it, besides the client: plain JSON values.
            call: Makes it; JSON values, too.
        """
        said = self._once(self.key(request), request, lambda: {"said": call()})
        return None if said is None else said["said"]

    def _all(
        self,
        requests: Sequence[dict[str, Any]],
        ask: Callable[[Any], dict[str, Any]],
        what: Sequence[Any],
        done: Callable[[], object],
    ) -> list[dict[str, Any] | None]:
        """Every different question once, several at a time where the client allows it."""
        keys = [self.key(r) for r in requests]
        first: dict[str, int] = {}
        for i, k in enumerate(keys):
            first.setdefault(k, i)

        def one(i: int) -> dict[str, Any] | None:
            said = self._once(keys[i], requests[i], lambda: ask(what[i]))
            done()
            return said

        threads = self.asking.concurrency if self.client.parallel else 1
        if threads <= 1:
            found = {k: one(i) for k, i in first.items()}
            return [found[k] for k in keys]
        with ThreadPoolExecutor(threads) as pool:
            futures = {k: pool.submit(one, i) for k, i in first.items()}
            try:
                return [futures[k].result() for k in keys]
            except BaseException:
                for f in futures.values():
                    f.cancel()
                raise

    def key(self, request: dict[str, Any]) -> str:
        """What an answer is kept by: the model and whose it is, the question, and what else decides the answer."""
        c = self.client
        said = json.dumps([c.name, dict(c.identity), dict(c.params), request], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def _once(self, key: str, request: dict[str, Any], call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        path = self.cache and self.cache / key[:2] / f"{key}.json"
        if path and path.exists():
            self._count("cached")
            return json.loads(path.read_text(encoding="utf-8"))["answer"]
        said = self._patiently(call)
        if said is None:
            return None
        self._count("new")
        for k in ("tokens_in", "tokens_out"):
            self._count(k, int(said.get(k, 0)))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            asked = {k: v if k != "chat" else [_short(m) for m in v] for k, v in request.items()}
            c = self.client
            record = {"model": c.name, **c.identity, "params": dict(c.params), "asked": asked, "answer": said}
            write_whole(path, json.dumps(record, ensure_ascii=False).encode())
        return said

    def _patiently(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        for attempt in range(self.asking.retries + 1):
            try:
                return call()
            except NoReply as e:
                if e.again and attempt < self.asking.retries:
                    self._count("retried")
                    self.sleep(max(e.after, FIRST_WAIT * 2**attempt))
                    continue
                self._failed(str(e), e.again)
                return None
        return None

    def _failed(self, why: str, away: bool) -> None:
        with self._lock:
            self.counts["failed"] += 1
            self.away = self.away + 1 if away else 0
            if why in self.reasons or len(self.reasons) < 10:
                self.reasons[why] = self.reasons.get(why, 0) + 1
            dead = self.away >= DEAD and not self.counts["new"] and not self.counts["cached"]
        if dead:
            raise InputError(f"client {self.name} answered none of {self.counts['failed']} questions: {why}")

    def count_nonsense(self) -> None:
        """Count an answer that said nothing of what was asked."""
        self._count("nonsense")

    def count_abstained(self) -> None:
        """Count an answer that said that there is nothing."""
        self._count("abstained")

    def _count(self, what: str, n: int = 1) -> None:
        with self._lock:
            self.counts[what] += n


def _short(message: dict[str, Any]) -> dict[str, Any]:
    """A message for the record, its images by their hashes."""
    return message | {"images": [hashlib.blake2b(i.encode(), digest_size=8).hexdigest() for i in message["images"]]}

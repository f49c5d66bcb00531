"""Any server that speaks OpenAI's interface: hosted ones, vLLM, llama.cpp, Ollama, LM Studio.

Only fields that all of them know are sent: ``model``, ``messages`` (images as base64 data URIs), ``temperature``,
``max_tokens``. Log-probabilities of a text need a server that echoes prompts (``/completions`` with ``echo``), as vLLM
and llama.cpp do.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmsae.interpret.clients.client import Client, Message, NoReply, Reply
from mmsae.types import InputError

URL, KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


def data_uri(image: bytes) -> str:
    """An encoded image as a data URI."""
    kind = next((k for mark, k in _KINDS.items() if image.startswith(mark)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


class ServerClient(Client):
    """A model on a server.

    Args:
        model: Name of the model there.
        base_url: Where, up to ``/v1``.
        key_env: Environment variable that holds the key; where it is not set, none is sent.
        max_tokens: Length of answers.
        timeout: Seconds to wait for one.
    """

    parallel = True

    def __init__(
        self, model: str, base_url: str = URL, key_env: str = KEY, max_tokens: int = 512, timeout: float = 60.0
    ):
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"base_url {base_url!r} is no http:// or https:// address")
        self.name, self.url, self.key_env, self.timeout = model, base_url.rstrip("/"), key_env, timeout
        self.params = {"temperature": 0, "max_tokens": max_tokens}
        scheme, _, rest = self.url.partition("://")
        place, slash, path = rest.partition("/")
        self.identity = {"server": f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"}  # no password is kept

    def chat(self, messages: Sequence[Message]) -> Reply:
        said = self._post("chat/completions", {"messages": [_plain(m) for m in messages], **self.params})
        try:
            text, usage = said["choices"][0]["message"]["content"] or "", said.get("usage") or {}
        except (KeyError, IndexError, TypeError) as e:
            raise NoReply(f"{self.url} answered without choices: {json.dumps(said)[:200]}", again=False) from e
        return Reply(text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))

    def score(self, prefix: str, continuation: str) -> np.ndarray:
        said = self._post("completions", {"prompt": prefix + continuation, "echo": True, "logprobs": 1, "max_tokens": 1,
                                          "temperature": 0})  # fmt: skip
        try:
            found = said["choices"][0]["logprobs"]
            start, end = len(prefix), len(prefix) + len(continuation)
            pairs = zip(found["text_offset"], found["token_logprobs"], strict=True)
            out = [v for at, v in pairs if start <= at < end and v is not None]
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise InputError(f"{self.url} echoes no log-probabilities of a prompt, which scores of texts need") from e
        return np.array(out, float)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        said = self._post("embeddings", {"input": list(texts)})
        try:
            rows = np.array([d["embedding"] for d in sorted(said["data"], key=lambda d: d["index"])], np.float32)
        except (KeyError, TypeError) as e:
            raise InputError(f"{self.url} gives no embeddings") from e
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env, ""):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps({"model": self.name, **body}).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as e:
            raise self._refused(e) from e
        except ValueError as e:
            raise NoReply(f"{self.url}: the answer is no JSON") from e
        except (OSError, http.client.HTTPException) as e:  # no connection, a timeout, or one that breaks off
            raise NoReply(f"{self.url}: {getattr(e, 'reason', e)}") from e
        if not isinstance(found, dict):
            raise NoReply(f"{self.url} answered no JSON object")
        return found

    def _refused(self, e: urllib.error.HTTPError) -> Exception:
        why = e.read(300).decode("utf-8", "replace").replace("\n", " ")
        if e.code in (401, 403, 404):
            return InputError(
                f"{self.url} answers {e.code} for model {self.name} ({why}): see --base-url, --client and the key in "
                f"${self.key_env}"
            )
        wait = e.headers.get("Retry-After", "") if e.headers else ""
        return NoReply(f"{self.url} answers {e.code}: {why}", e.code == 429 or e.code >= 500,
                       float(wait) if wait.replace(".", "", 1).isdigit() else 0.0)  # fmt: skip


def _plain(m: Message) -> dict[str, Any]:
    if not m.images:
        return {"role": m.role, "content": m.text}
    parts = [{"type": "image_url", "image_url": {"url": data_uri(i)}} for i in m.images]
    return {"role": m.role, "content": [*parts, {"type": "text", "text": m.text}]}

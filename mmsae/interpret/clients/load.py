"""The client that options name."""

from __future__ import annotations

from pathlib import Path

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Client
from mmsae.interpret.clients.options import Asking
from mmsae.options import at_least
from mmsae.types import InputError


def load_client(asking: Asking, device: str = "auto", precision: str = "fp32") -> Client:
    """A client by its name.

    Raises:
        InputError: No such kind.
    """
    kind, _, rest = asking.client.partition(":")
    if not rest or kind not in ("openai", "local", "script"):
        raise InputError(f"client {asking.client!r} is not openai:MODEL, local:MODEL or script:MODULE:FUNCTION")
    if kind == "script":
        from mmsae.interpret.clients.scripted import ScriptedClient

        return ScriptedClient.of(rest)
    if kind == "openai":
        from mmsae.interpret.clients.server import ServerClient

        return ServerClient(rest, asking.base_url, asking.key_env, asking.max_tokens, asking.timeout)
    from mmsae.interpret.clients.local import LocalClient

    return LocalClient(rest, device, precision, asking.max_tokens)


def asked_client(asking: Asking, cache: Path | None, device: str = "auto", precision: str = "fp32") -> Asked | None:
    """The client with its memory in a folder; None where nobody is to be asked."""
    if not asking.client:
        return None
    at_least(1, concurrency=asking.concurrency, max_tokens=asking.max_tokens)
    at_least(0, retries=asking.retries, asked=asking.asked)
    return Asked(load_client(asking, device, precision), cache, asking)

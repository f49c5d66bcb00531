"""Options of the commands that may ask a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Asking:
    """Whom to ask, where a language or vision-language model is asked at all."""

    client: str = ""
    """``openai:MODEL`` on any server with OpenAI's interface, ``local:FOLDER_OR_ID`` for a language model of
    transformers, ``local:lvlm:FOLDER_OR_ID`` for a vision-language model, ``script:MODULE:FUNCTION``; empty: nobody."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the server, up to /v1; vLLM: http://localhost:8000/v1."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key."""
    max_tokens: int = 256
    """Length of answers."""
    asked: int = 50
    """Latents that are asked about, drawn by the seed; 0: all."""
    concurrency: int = 4
    """Questions under way at once, on servers."""
    retries: int = 3
    """How often a question is asked again that got no answer; waits double."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""
    price_in: float = 0.0
    """Price of a million tokens of questions, for the account of costs."""
    price_out: float = 0.0
    """Price of a million tokens of answers."""

"""Explanations that come from what a push changes, not from what a latent fires on (Delphi's intervention scoring,
arXiv 2410.13928, its released history): the words that a pushed model is likelier to say, and what a model that is
asked makes of them.

The best is chosen on texts of the tuning prompts, so that its score on those of the scoring prompts is not that of a
choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Message
from mmsae.interpret.clients.parse import phrases

MOST = 5  # explanations that a model proposes, and words that rise
SHOWN = 5  # pairs of texts that a question shows
SYSTEM = "You explain what a change inside a language model makes it say. You answer exactly in the form asked for."
ASK = (
    "A unit inside a model was made stronger. The words that it is then likelier to say next, the most first: {risen}."
    "\n\nWhat it said before and after:\n{pairs}\n\nWhat does the unit make the model talk about? Answer with a JSON "
    "list of up to {n} short explanations, a word or a few each, and nothing else; an empty list if you see nothing."
)


def question(risen: Sequence[str], clean: Sequence[str], pushed: Sequence[str]) -> list[Message]:
    """What is asked about one push."""
    lines = [f"{i}. before: {a}\n   after: {b}" for i, (a, b) in enumerate(zip(clean, pushed, strict=True), 1)]
    text = ASK.format(risen=", ".join(risen) or "none", pairs="\n".join(lines[:SHOWN]), n=MOST)
    return [Message("system", SYSTEM), Message("user", text)]


def proposals(asked: Asked, risen: Sequence[str], clean: Sequence[str], pushed: Sequence[str]) -> list[str]:
    """Explanations of one push, each once: the words that rise, and what the model proposes if it can be asked.

    Args:
        asked: Whom to ask.
        risen: Words that are likelier by the push, the most first.
        clean: What was said without the push.
        pushed: What was said with it, of the same prompts.
    """
    out = list(risen)
    if asked.client.chats:
        text = asked.chat([question(risen, clean, pushed)])[0]
        said = phrases(text, MOST)
        if said:
            out += said
        elif said is not None:
            asked.count_abstained()
        elif text is not None:
            asked.count_nonsense()
    return list(dict.fromkeys(out))


def best_of(texts: Sequence[str], gains: np.ndarray) -> str | None:
    """The text of the largest mean gain ``(texts, prompts)``, the first of equal ones; None where none has any."""
    mean = [g[~np.isnan(g)].mean() if (~np.isnan(g)).any() else -np.inf for g in gains]
    return texts[int(np.argmax(mean))] if np.isfinite(mean).any() else None

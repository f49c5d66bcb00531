"""Surprisal score, after Delphi (arXiv 2410.13928): does a name make the latent's texts less surprising to a language
model than a text that says nothing?

``S = mean_t [CE(t given neutral text) - CE(t given name)]`` over the tokens of an example; the score is the AUROC of S
of positives against negatives. Nobody is asked a question, so nobody can misunderstand one.
"""

from __future__ import annotations

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.scores.outcomes import Scores, auroc_scores
from mmsae.interpret.scores.subjects import Subjects

NEUTRAL = "something"
PROMPT = "The following text is about {name}.\n\nText: "
EACH = 10


def prompt_of(name: str) -> str:
    """What stands before an example."""
    return PROMPT.format(name=name)


def gains(asked: Asked, names: list[str], texts: list[str]) -> np.ndarray:
    """``(n,)`` mean gain in nats per token of texts by names, beside :data:`NEUTRAL`; NaN without an answer."""
    pairs = [(prompt_of(n), t) for n, t in zip(names, texts, strict=True)]
    plain = [(prompt_of(NEUTRAL), t) for t in texts]
    out = []
    for a, b in zip(asked.score(pairs), asked.score(plain), strict=True):
        out.append(np.nan if a is None or b is None or not len(a) or not len(b) else np.mean(a) - np.mean(b))
    return np.array(out, float)


def surprisal(s: Subjects, asked: Asked, each: int = EACH) -> Scores:
    """AUROC of the gain by the name on captions of unseen positives against negatives."""
    captions, sides = s.ev.items.caption, []
    for items in (s.positive[:, :each], s.negative[:, :each]):
        rows, columns = np.nonzero((items >= 0) & np.array([[bool(captions[i]) for i in row] for row in items]))
        texts = [captions[i] for i in items[rows, columns].tolist()]
        side = np.full(items.shape, np.nan)
        if texts:
            side[rows, columns] = gains(asked, [s.names.phrases[r] for r in rows.tolist()], texts)
        sides.append(side)
    return auroc_scores(s.latents, *sides)

"""Which words and phrases some captions have more often than others: log-odds with an informative Dirichlet prior.

B. Monroe, M. Colaresi and K. Quinn, Fightin' Words, Political Analysis 2008, section 3.5. Counts here are of captions
that have a phrase, so that the prior of each phrase is a Beta distribution and phrases of one caption may overlap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

WORD = re.compile(r"\w+")
#: English words that say how things are told, not what is there.
FUNCTION_WORDS = frozenset("a an and are as at by for from in is it its of on or that the this to with".split())
PRIOR = 100.0  # captions that the prior counts as much as


def phrases_of(caption: str, longest: int = 3) -> Iterator[str]:
    """The phrases of up to ``longest`` words of a caption, lower case, that neither begin nor end with a word of
    :data:`FUNCTION_WORDS`; they may have one within: ``plate of food``.
    """
    words = WORD.findall(caption.lower())
    for i, first in enumerate(words):
        if first not in FUNCTION_WORDS:
            for j in range(i, min(i + longest, len(words))):
                if words[j] not in FUNCTION_WORDS:
                    yield " ".join(words[i : j + 1])


def log_odds(
    hits: np.ndarray,
    n: np.ndarray,
    other_hits: np.ndarray,
    other_n: np.ndarray,
    share: np.ndarray,
    prior: float = PRIOR,
) -> np.ndarray:
    """``(L, V)`` z-scores of the log-odds ratio of V phrases, in L groups of captions against others.

    With ``a = prior * share``, ``y`` hits among ``n`` captions and the same of others,
    ``delta = log((y + a) / (n + prior - y - a)) - log((y' + a) / (n' + prior - y' - a))``, over its standard deviation
    ``sqrt(1 / (y + a) + 1 / (y' + a))``.

    Args:
        hits: ``(L, V)`` captions of each group that have a phrase; weights may make them fractions.
        n: ``(L,)`` captions of each group.
        other_hits: ``(L, V)`` the same of the captions that they are compared with.
        other_n: ``(L,)`` their number.
        share: ``(V,)`` share of all captions that have a phrase, above 0 and below 1.
        prior: How many captions the prior counts as much as; more draw rare phrases further towards 0.
    """
    a = prior * share
    y, z = hits + a, other_hits + a
    rest, other_rest = n[:, None] + prior - y, other_n[:, None] + prior - z
    delta = np.log(y) - np.log(np.maximum(rest, 1e-9)) - np.log(z) + np.log(np.maximum(other_rest, 1e-9))
    return delta / np.sqrt(1 / y + 1 / z)

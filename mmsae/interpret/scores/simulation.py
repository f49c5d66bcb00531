"""Simulation score, after S. Bills et al. ("Language models can explain neurons in language models", 2023) and Delphi
(arXiv 2410.13928): from the name alone a judge predicts how strongly the latent fires on unseen items, and the score is
Pearson's correlation of that with what it does.

Here a prediction is of an item as a whole, and items are the positives of all strengths and the negatives of the
evidence, so that scores of rare and of frequent latents can be compared. A model says a number from 0 to 10; without
one the prediction is the cosine of the item's embedding with the name's, of which a correlation takes any linear
function for the same.
"""

from __future__ import annotations

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.parse import levels
from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.scores.asking import BATCH, EACH, examples_of, question
from mmsae.interpret.scores.clip_judge import similarities
from mmsae.interpret.scores.outcomes import Scores, Z
from mmsae.interpret.scores.subjects import Subjects
from mmsae.interpret.shown import ItemViews

MOST = 10
SIMULATE = (
    'Something reacts to "{name}". How strongly does it react to each of these {n} examples? Answer with a JSON list '
    f"of {{n}} numbers from 0 (not at all) to {MOST} (as strongly as it can), in order, and nothing else."
)


def values_at(lists: SparseRows, latents: np.ndarray, items: np.ndarray) -> np.ndarray:
    """``(L, E) float64`` absolute values of latents ``(L,)`` on items ``(L, E)``; NaN for item -1."""
    out = np.where(items >= 0, 0.0, np.nan)
    for row, j in enumerate(latents.tolist()):
        index, value = lists.row(j)
        if len(index):
            at = np.searchsorted(index, items[row]).clip(max=len(index) - 1)
            hit = (items[row] >= 0) & (np.asarray(index)[at] == items[row])
            out[row, hit] = np.abs(np.asarray(value)[at[hit]])
    return out


def correlation_scores(latents: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> Scores:
    """Pearson's r of rows ``(L, E)``, NaN for none, with Fisher's interval; chance 0.

    NaN for rows with fewer than four outcomes, or of which one side does not vary.
    """
    has = ~(np.isnan(predicted) | np.isnan(true))
    n = has.sum(1)
    sides = []
    for x in (predicted, true):
        x = np.where(has, x, 0)
        sides.append(np.where(has, x - (x.sum(1) / np.maximum(n, 1))[:, None], 0))
    a, b = sides
    product, scale = (a * b).sum(1), np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    can = (n > 3) & (scale > 1e-12)
    r = np.where(can, product / np.where(can, scale, 1), np.nan).clip(-1, 1)
    middle, half = np.arctanh(r.clip(-1 + 1e-9, 1 - 1e-9)), Z / np.sqrt(np.maximum(n - 3, 1))
    return Scores(latents, r, 0.0, n, np.tanh(middle - half), np.tanh(middle + half))


def simulated(s: Subjects, embeddings: np.ndarray, vectors: np.ndarray) -> Scores:
    """By the cosines of items with the vectors ``(L, width)`` of names."""
    items = np.concatenate([s.positive, s.negative], 1)
    predicted = similarities(items, embeddings, vectors[:, None])[:, 0].astype(np.float64)
    return correlation_scores(s.latents, predicted, values_at(s.ev.lists(s.modality), s.latents, items))


def simulated_by(s: Subjects, asked: Asked, views: ItemViews, each: int = EACH, seed: int = 0) -> Scores:
    """By asking a model about ``each`` positives and as many negatives; answers of another form are abstentions."""
    items, _ = examples_of(s, each, seed)
    questions, at = [], []
    for row in range(len(items)):
        own = items[row][items[row] >= 0].tolist()
        for lo in range(0, len(own), BATCH):
            shown = [views.plain(i) for i in own[lo : lo + BATCH]]
            questions.append(question(SIMULATE.format(name=s.names.phrases[row], n=len(shown)), shown))
            at.append((row, lo, len(shown)))
    predicted = np.full(items.shape, np.nan)
    for (row, lo, n), text in zip(at, asked.chat(questions), strict=True):
        said = levels(text, n, MOST)
        if said is not None:
            predicted[row, lo : lo + n] = said
        elif text is not None:
            asked.count_nonsense()
    return correlation_scores(s.latents, predicted, values_at(s.ev.lists(s.modality), s.latents, items))

"""Scores by asking a language or vision-language model, after Delphi (arXiv 2410.13928): detection, fuzzing, intruder,
pointing.

Answers that say nothing of what was asked are abstentions: they are counted, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Message
from mmsae.interpret.clients.parse import flags, json_in, one_number
from mmsae.interpret.scores.outcomes import Scores, Z, accuracy_scores
from mmsae.interpret.scores.subjects import Subjects
from mmsae.interpret.scores.vectors import intruder_sets
from mmsae.interpret.shown import ItemViews

BATCH = 5  # examples of one question
EACH = 10  # positives, and as many negatives, of one latent
SYSTEM = "You judge whether short descriptions fit examples. You answer exactly in the form that is asked for."


class Outcomes(NamedTuple):
    """Votes about examples of L latents."""

    truth: np.ndarray  #: ``(L, E)`` bool
    vote: np.ndarray  #: ``(L, E)`` 1, 0, or -1 where the judge abstained or there is no example

    def scores(self, latents: np.ndarray) -> Scores:
        """Balanced accuracy with chance .5; the interval is that of the mean of two shares."""
        hit, n = [], []
        for side in (True, False):
            own = (self.truth == side) & (self.vote >= 0)
            hit.append(((self.vote == side) & own).sum(1))
            n.append(own.sum(1))
        (a, b), (n_a, n_b) = hit, n
        with np.errstate(invalid="ignore", divide="ignore"):
            value = (a / n_a + b / n_b) / 2
            p, q = (a + 1) / (n_a + 2), (b + 1) / (n_b + 2)  # no interval of width 0 where all are right
            half = Z / 2 * np.sqrt(p * (1 - p) / n_a + q * (1 - q) / n_b)
        return Scores(latents, value, 0.5, n_a + n_b, np.clip(value - half, 0, 1), np.clip(value + half, 0, 1))


def examples_of(s: Subjects, each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``(items (L, 2 each), truth)``: positives evenly over the quantiles and as many negatives, in random order.

    -1 where a latent has fewer.
    """
    rng = np.random.default_rng(seed)
    n_pos = (s.positive >= 0).sum(1)
    count = np.minimum(np.minimum(n_pos, (s.negative >= 0).sum(1)), each)
    spread = (np.arange(each) * n_pos[:, None] / np.maximum(count, 1)[:, None]).astype(int)  # strongest to weakest
    width = max(each, s.positive.shape[1], s.negative.shape[1])
    on, off = (np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=-1) for t in (s.positive, s.negative))
    use = np.arange(each) < count[:, None]
    on = np.where(use, np.take_along_axis(on, spread.clip(0, width - 1), 1), -1)
    items = np.concatenate([on, np.where(use, off[:, :each], -1)], 1)
    truth = np.repeat([[True] * each + [False] * each], len(items), 0)
    order = rng.random(items.shape).argsort(1)
    order = np.take_along_axis(order, np.argsort(np.take_along_axis(items, order, 1) < 0, 1, kind="stable"), 1)
    return np.take_along_axis(items, order, 1), np.take_along_axis(truth, order, 1)


def numbered(shown: Sequence[tuple[str, bytes | None]]) -> tuple[str, tuple[bytes, ...]]:
    """Examples as a text of numbered lines, and their images, in order."""
    lines = [f"{i}. {text or f'image {i}'}" for i, (text, _) in enumerate(shown, 1)]
    return "\n".join(lines), tuple(image for _, image in shown if image is not None)


def question(task: str, shown: Sequence[tuple[str, bytes | None]]) -> list[Message]:
    """A task with its examples."""
    lines, images = numbered(shown)
    return [Message("system", SYSTEM), Message("user", f"{task}\n\n{lines}", images)]


def _vote(asked: Asked, questions: list[list[Message]], sizes: list[int]) -> list[list[int]]:
    votes = []
    for text, n in zip(asked.chat(questions), sizes, strict=True):
        found = flags(text, n)
        if text is not None and found is None:
            asked.count_nonsense()
        votes.append([-1] * n if found is None else [int(v) for v in found])
    return votes


def _outcomes(
    s: Subjects,
    asked: Asked,
    items: np.ndarray,
    truth: np.ndarray,
    task: str,
    show: list[list[tuple[str, bytes | None]]],
) -> Scores:
    """Ask about all examples of all latents, :data:`BATCH` at a time."""
    questions, sizes, at = [], [], []
    for row, shown in enumerate(show):
        for lo in range(0, len(shown), BATCH):
            part = shown[lo : lo + BATCH]
            questions.append(question(task.format(name=s.names.phrases[row], n=len(part)), part))
            sizes.append(len(part))
            at.append((row, lo))
    vote = np.full(items.shape, -1)
    for (row, lo), said in zip(at, _vote(asked, questions, sizes), strict=True):
        vote[row, lo : lo + len(said)] = said
    return Outcomes(truth, vote).scores(s.latents)


DETECT = (
    'Which of these {n} examples fit the description "{name}"? Answer with a JSON list of {n} numbers, 1 for those '
    "that fit and 0 for the others, in order, and nothing else."
)
FUZZ = (
    "In each of these {n} examples something is marked (text between << and >>, or red in an image). Is what is marked "
    '"{name}"? Answer with a JSON list of {n} numbers, 1 for yes and 0 for no, in order, and nothing else.'
)
INTRUDE = (
    "All of these {n} examples but one have something in common. Which one does not belong? Answer with its number, "
    "and nothing else."
)
POINT = (
    'Where in this image is "{name}"? Answer in JSON as {{"x": ..., "y": ...}}, from 0 (left, top) to 1 (right, '
    "bottom), and nothing else."
)


def detection(s: Subjects, asked: Asked, views: ItemViews, each: int = EACH, seed: int = 0) -> Scores:
    """Does the name fit the item? Balanced accuracy over unseen positives and negatives."""
    items, truth = examples_of(s, each, seed)
    show = [[views.plain(i) for i in row[row >= 0].tolist()] for row in items]
    return _outcomes(s, asked, items, truth, DETECT, show)


def fuzzing(s: Subjects, asked: Asked, views: ItemViews, each: int = EACH, seed: int = 0) -> Scores:
    """Are the marked places of unseen positives the right ones? In half of them as many others are marked."""
    n_pos = (s.positive >= 0).sum(1)
    rng = np.random.default_rng(seed)
    count = np.minimum(2 * each, n_pos)
    items = np.where(np.arange(2 * each) < count[:, None], _padded(s.positive, 2 * each), -1)
    truth = rng.random(items.shape) < 0.5
    show = [
        [views.marked(i, j, not right) for i, right in zip(row.tolist(), t.tolist(), strict=True) if i >= 0]
        for j, row, t in zip(s.latents.tolist(), items, truth, strict=True)
    ]
    return _outcomes(s, asked, items, truth, FUZZ, show)


def _padded(items: np.ndarray, width: int) -> np.ndarray:
    missing = max(0, width - items.shape[1])
    return np.pad(items, ((0, 0), (0, missing)), constant_values=-1)[:, :width]


def intruder(s: Subjects, asked: Asked, views: ItemViews, size: int = 5, trials: int = 6, seed: int = 0) -> Scores:
    """Which item does not belong? No name is shown; accuracy with chance ``1 / size``."""
    sets, odd = intruder_sets(s.positive, s.negative, size, trials, seed)
    rows = np.flatnonzero(sets[:, 0, 0] >= 0)
    questions = [
        question(INTRUDE.format(n=size), [views.plain(i) for i in trial.tolist()]) for r in rows for trial in sets[r]
    ]
    found = np.full(odd.shape, -1)
    for k, text in enumerate(asked.chat(questions)):
        said = one_number(text, 1, size)
        if text is not None and said is None:
            asked.count_nonsense()
        found[rows[k // trials], k % trials] = -1 if said is None else said - 1
    return accuracy_scores(s.latents, (found == odd).sum(1), (found >= 0).sum(1), 1 / size)


def pointing(s: Subjects, asked: Asked, views: ItemViews, each: int = EACH) -> Scores:
    """Does the place that the judge points at lie where the latent is above half of its largest value in the image?

    Chance is the share of its images that this is, the mean of each latent; the value is that of hits.
    """
    questions, heats, at = [], [], []
    for row, j in enumerate(s.latents.tolist()):
        for i in s.positive[row][s.positive[row] >= 0][:each].tolist():
            heat, (_, image) = views.ev.heat(i, j, s.modality), views.plain(i)
            if heat is not None and image is not None and np.abs(heat).max() > 0:
                questions.append([Message("user", POINT.format(name=s.names.phrases[row]), (image,))])
                heats.append((np.abs(heat) > np.abs(heat).max() / 2, views.ev.items.view[i]))
                at.append(row)
    hits, n = np.zeros(len(s.latents)), np.zeros(len(s.latents), int)
    for text, (strong, view), row in zip(asked.chat(questions), heats, at, strict=True):
        place = _place(text)
        if place is None:
            if text is not None:
                asked.count_nonsense()
            continue
        n[row] += 1
        hits[row] += pointed(place, strong, view)
    area, shown = np.zeros(len(s.latents)), np.zeros(len(s.latents), int)
    np.add.at(area, at, [strong.mean() * np.prod(view[2:] - view[:2]) for strong, view in heats])
    np.add.at(shown, at, 1)
    chance = np.divide(area, shown, out=np.full(len(area), np.nan), where=shown > 0)
    return accuracy_scores(s.latents, hits, n, chance)


def _place(text: str | None) -> tuple[float, float] | None:
    found = json_in(text)
    place = [found.get(k) for k in ("x", "y")] if isinstance(found, dict) else [None]
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v <= 1 for v in place):
        return None
    return float(place[0]), float(place[1])


def pointed(place: tuple[float, float], strong: np.ndarray, view: np.ndarray) -> bool:
    """Whether a point of the image, from 0 to 1, lies on a patch of ``strong (rows, cols)`` of the host's view."""
    x, y = ((v - lo) / (hi - lo) for v, lo, hi in zip(place, view[:2], view[2:], strict=True))
    if not (0 <= x <= 1 and 0 <= y <= 1):
        return False
    rows, cols = strong.shape
    return bool(strong[min(int(y * rows), rows - 1), min(int(x * cols), cols - 1)])

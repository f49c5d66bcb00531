"""From candidates to names: the best of each latent on the train half, and whether it holds on the test half."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmsae.interpret.guesses import Candidates
from mmsae.interpret.names.options import Holding
from mmsae.interpret.names.phrases import BestPhrases
from mmsae.metrics.concepts.names import LatentName

#: ``(positive (L, P), negative (L, N), phrases (L, m)) -> (L, m)`` AUROC of phrases on items, see :func:`judged`.
Judge = Callable[[np.ndarray, np.ndarray, Sequence[Sequence[str]]], np.ndarray]
EQUAL = 0.02  # AUROCs of the train half that are taken as one
#: Which of several names that do equally well is taken.
ORDER = ("lvlm", "captions", "wpmi", "centroid", "vocabulary", "steering")


class Examples(NamedTuple):
    """Items of one half for L latents, -1 for none."""

    positive: np.ndarray  #: ``(L, P)``
    negative: np.ndarray  #: ``(L, N)`` silent ones drawn at random
    hard: np.ndarray  #: ``(L, N)`` silent ones that are most like the positives

    def of(self, latents: np.ndarray) -> Examples:
        """Those of some latents."""
        return Examples(*(t[latents] for t in self))


def as_candidates(
    best: BestPhrases, phrases: Sequence[str], method: str, modality: str, judges: Mapping[str, Judge], train: Examples
) -> Candidates:
    """The best phrases of one method as rows, each with its AUROC on the train half of the same latents, by the judge
    to which it says most there, as the mean over random and hard negatives.
    """
    n, m = best.phrase.shape
    words = np.array(phrases, object)[best.phrase] if m else np.zeros((n, 0), object)
    each = [_both(j, train, words.tolist()).mean(0) if n and m else np.zeros((n, m)) for j in judges.values()]
    found = np.nan_to_num(np.stack(each), nan=-1)
    which, auroc = found.argmax(0), found.max(0)
    said = [np.full(n * m, v, object) for v in (modality, method)]
    names = np.array(list(judges), object)[which.ravel()]
    return Candidates(
        np.repeat(best.latents, m).astype(np.int32), *said, words.ravel(),
        *(v.ravel().astype(np.float64) for v in (best.score, best.margin, best.z)), names,
        np.where(auroc < 0, np.nan, auroc).ravel().astype(np.float64),
        np.full(n * m, np.nan), np.full(n * m, np.nan), np.zeros(n * m, bool),
    )  # fmt: skip


def _both(judge: Judge, own: Examples, phrases: Sequence[Sequence[str]]) -> np.ndarray:
    """``(2, L, m)`` AUROC against random and against hard negatives; where there are no hard ones, the former twice."""
    found = np.stack([judge(own.positive, negative, phrases) for negative in own[1:]])
    found[1] = np.where((own.hard >= 0).any(1)[:, None], found[1], found[0])
    return found


def choose(found: Candidates, holding: Holding) -> Candidates:
    """Mark the best row of every latent: those whose z suffices first, then by AUROC on the train half, by method and
    rank.
    """
    place = np.array([ORDER.index(m) for m in found.method.tolist()], int)
    enough = ~(found.z < holding.min_z)
    auroc = np.nan_to_num(np.round(found.auroc_train / EQUAL), nan=-1)
    order = np.lexsort((np.arange(len(place)), place, -auroc, ~enough, found.latent))
    first = np.ones(len(order), bool)
    first[1:] = found.latent[order][1:] != found.latent[order][:-1]
    chosen = np.zeros(len(order), bool)
    chosen[order[first]] = True
    return found._replace(chosen=chosen)


def judged(found: Candidates, test: Mapping[str, Examples], judges: Mapping[str, Mapping[str, Judge]]) -> Candidates:
    """The AUROC of chosen rows on the test half by the judge of the train half.

    ``test`` are ``{modality: examples of all latents}``, ``judges`` those of each modality by name.
    """
    auroc, hard = found.auroc.copy(), found.auroc_hard.copy()
    for m, own_judges in judges.items():
        for name, judge in own_judges.items():
            rows = np.flatnonzero(found.chosen & (found.modality == m) & (found.judge == name))
            if len(rows):
                own = test[m].of(found.latent[rows])
                auroc[rows], hard[rows] = _both(judge, own, found.phrase[rows][:, None].tolist())[..., 0]
    return found._replace(auroc=auroc, auroc_hard=hard)


def names_of(
    found: Candidates, items: Mapping[str, np.ndarray], holding: Holding, by: Mapping[str, str]
) -> dict[int, LatentName]:
    """``{latent: name}`` of the chosen rows; a name that does not hold is None, with the reason and the guess.

    Args:
        found: Candidates, the chosen ones judged.
        items: ``{modality: (d_sae,) number of unseen items on which each latent fires}``.
        holding: When a name holds.
        by: ``{method: who}``.
    """
    out = {}
    for i in np.flatnonzero(found.chosen).tolist():
        latent, phrase = int(found.latent[i]), str(found.phrase[i])
        z, auroc, n = float(found.z[i]), float(found.auroc[i]), int(items[found.modality[i]][latent])
        why = []
        if n < holding.min_items:
            why.append(f"fires on {n} unseen items, fewer than {holding.min_items}")
        elif not auroc >= holding.min_auroc:
            why.append(f"AUROC {auroc:.2f} is below {holding.min_auroc:g}")
        elif auroc < holding.clear and not (hard := float(found.auroc_hard[i])) >= holding.min_hard:
            why.append(f"AUROC {hard:.2f} against hard negatives is below {holding.min_hard:g}")
        if z < holding.min_z:
            why.append(f"z {z:.1f} is below {holding.min_z:g}")
        seen = f"by the {found.judge[i]} of {found.modality[i]}s"
        note = f"best guess {phrase!r}, {seen}: {', '.join(why)}" if why else seen
        method = str(found.method[i])
        out[latent] = LatentName(
            None if why else phrase, method, float(found.score[i]), float(found.margin[i]), z, auroc,
            by.get(method, ""), note,
        )  # fmt: skip
    return out

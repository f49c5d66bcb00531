"""From candidates to names: the best of each latent on the train half, and whether it holds on the test half."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmsae.interpret.guesses import Candidates
from mmsae.interpret.names.options import Holding
from mmsae.interpret.names.phrases import BestPhrases
from mmsae.interpret.names.unseen import Unseen
from mmsae.metrics.concepts.names import LatentName
from mmsae.types import InputError

#: ``(positive (L, P), negative (L, N), phrases (L, m), weight (L, P) or None) -> (L, m)`` AUROC of phrases on items.
Judge = Callable[[np.ndarray, np.ndarray, Sequence[Sequence[str]], np.ndarray | None], np.ndarray]
EQUAL = 0.01  # AUROCs of the train half that are taken as one
#: Which of several names that do equally well is taken.
ORDER = ("lvlm", "captions", "wpmi", "centroid", "vocabulary", "steering")


class Examples(NamedTuple):
    """Items of the train half for L latents, -1 for none."""

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
        np.full(n * m, np.nan), np.zeros(n * m, bool),
    )  # fmt: skip


def _both(judge: Judge, own: Examples, phrases: Sequence[Sequence[str]]) -> np.ndarray:
    """``(2, L, m)`` AUROC against random and against hard negatives; where there are no hard ones, the former twice."""
    found = np.stack([judge(own.positive, negative, phrases, None) for negative in own[1:]])
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


def judged(
    found: Candidates,
    unseen: Callable[[str, np.ndarray], Unseen],
    judges: Mapping[str, Mapping[str, Judge]],
) -> Candidates:
    """The AUROC of chosen rows on unseen items, weighted by value, by the judge of the train half.

    ``unseen`` maps a modality and latents to their items; ``judges`` are those of each modality by name.
    """
    auroc = found.auroc.copy()
    for m, own_judges in judges.items():
        for name, judge in own_judges.items():
            rows = np.flatnonzero(found.chosen & (found.modality == m) & (found.judge == name))
            if len(rows):
                own = unseen(m, found.latent[rows])
                phrases = found.phrase[rows][:, None].tolist()
                auroc[rows] = judge(own.positive, own.negative, phrases, own.weight)[:, 0]
    return found._replace(auroc=auroc)


def fewest(rate: float) -> int:
    """Latents that a control needs so that at most the share ``rate`` of them may get a name."""
    return int(np.ceil(1 / rate - 1e-9)) - 1


def least_auroc(
    found: Candidates, modality: str, latents: int, items: np.ndarray, holding: Holding, rate: float
) -> float:
    """The least AUROC that at most ``rate`` of the latents of a control reach, one more counted among them.

    That one makes it hold for the next such latent, too (a conformal p-value of at most ``rate``), as far as that
    latent is one of the same kind. Names of the control that do not hold for another reason count as none.

    Args:
        found: What was found for the control, judged.
        modality: By which evidence.
        latents: Latents of the control that have evidence.
        items: ``(d_sae,)`` unseen items on which each fires.
        holding: When a name holds.
        rate: Share of latents of random weights that may get a name.

    Raises:
        InputError: The control has too few latents for so small a share.
    """
    allowed = int(rate * (latents + 1) + 1e-9) - 1
    if allowed < 0:
        raise InputError(f"a share of {rate:g} of false names takes a control of {fewest(rate)} latents "
                         f"or more with evidence of {modality}s, and this one has {latents}")  # fmt: skip
    own = found.rows(found.chosen & (found.modality == modality))
    can = ~(own.z < holding.min_z) & (items[own.latent] >= holding.min_items) & ~np.isnan(own.auroc)
    scores = np.sort(own.auroc[can])[::-1]
    return max(0.5, float(np.nextafter(scores[allowed], np.inf))) if len(scores) > allowed else 0.5


def names_of(
    found: Candidates,
    items: Mapping[str, np.ndarray],
    holding: Holding,
    by: Mapping[str, str],
    least: Mapping[str, float] | None = None,
) -> dict[int, LatentName]:
    """``{latent: name}`` of the chosen rows; a name that does not hold is None, with the reason and the guess.

    Args:
        found: Candidates, the chosen ones judged.
        items: ``{modality: (d_sae,) number of unseen items on which each latent fires}``.
        holding: When a name holds.
        by: ``{method: who}``.
        least: ``{modality: AUROC}`` from a control (:func:`least_auroc`), instead of ``holding.min_auroc``.
    """
    out = {}
    for i in np.flatnonzero(found.chosen).tolist():
        latent, phrase = int(found.latent[i]), str(found.phrase[i])
        z, auroc, n = float(found.z[i]), float(found.auroc[i]), int(items[found.modality[i]][latent])
        known = (least or {}).get(str(found.modality[i]))
        why = []
        if n < holding.min_items:
            why.append(f"fires on {n} unseen items, fewer than {holding.min_items}")
        elif not auroc >= (holding.min_auroc if known is None else known):
            why.append(f"AUROC {auroc:.3f} is below " + (f"{holding.min_auroc:g}" if known is None else
                       f"{known:.3f}, which {holding.false_names:.0%} of latents of random weights reach"))  # fmt: skip
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

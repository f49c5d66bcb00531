"""What is true of latents in the generated world, and whether their names say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.guesses import Candidates
from mmsae.interpret.scores.subjects import Names, Subjects
from mmsae.interpret.scores.vectors import farthest, intruder_scores
from mmsae.metrics.concepts.concepts import f1_table, thresholds
from mmsae.metrics.concepts.names import LatentName, names_only
from mmsae.world.generator.scene import CONCEPTS

CLEAR = 0.8  # F1 with a concept from which on a latent has a meaning that its name must say
#: Words of names that say nothing of the world's.
EMPTY = frozenset("a an the on in at shape background and".split())
CONVERSE = {"right of": "left of", "below": "above"}  # relations told from the other side


class Meaning(NamedTuple):
    """What the latents of some evidence mean."""

    f1: (
        np.ndarray
    )  #: ``(C, d_sae)`` F1 of each latent with each concept, thresholds from the train half, on the test half
    truth: np.ndarray  #: ``(n, C)`` bool


def meaning(ev: Evidence, truth: np.ndarray) -> Meaning:
    """F1 of latents with concepts on images; ``truth (n, C)`` is that of the items, in their order."""
    z, t = torch.from_numpy(ev.codes("image").matrix().toarray()), torch.from_numpy(truth)
    train = torch.from_numpy(ev.items.half == "train")
    at = thresholds(z[train])
    which = f1_table(z[train], t[train], at).argmax(0)
    tables = f1_table(z[~train], t[~train], at)
    return Meaning(tables.gather(0, which[None])[0].numpy(), truth)


def says(name: str, concept: str) -> bool:
    """Whether a name says a concept and nothing else: ``dark background`` says dark, ``striped red`` not red."""
    for other, own in CONVERSE.items():
        name = name.replace(other, own)
    return set(name.split()) - EMPTY == set(concept.split()) - EMPTY


def right(name: str, latent: int, m: Meaning) -> bool:
    """Whether a name is a concept with which a latent's F1 is clear."""
    return any(says(name, CONCEPTS[c]) for c in np.flatnonzero(m.f1[:, latent] >= CLEAR).tolist())


def figures(real: Meaning, found: Mapping[int, LatentName], tried: Candidates, none: Mapping[int, LatentName],
            live: Sequence[Sequence[int]]) -> dict[str, float]:  # fmt: skip
    """Figures of one way of naming.

    Args:
        real: What the SAE's latents mean.
        found: Their names.
        tried: The best guess of each among them.
        none: Names of latents of random weights.
        live: Latents with evidence, of the SAE and of random weights.
    """
    names, own, random = names_only(found), *live
    clear = [j for j in own if real.f1[:, j].max() >= CLEAR]
    chosen = tried.rows(tried.chosen)
    guess = dict(zip(chosen.latent.tolist(), chosen.phrase.tolist(), strict=True))
    said = [j for j in clear if j in names]
    n = max(1, len(clear))
    return {
        "clear": len(clear), "guess_right": sum(right(guess[j], j, real) for j in clear if j in guess) / n,
        "named_right": sum(right(names[j], j, real) for j in said) / n,
        "named_wrong": sum(not right(names[j], j, real) for j in said) / n,
        "named": sum(j in names for j in own) / max(1, len(own)), "live": len(own),
        "abstained_random": 1 - sum(j in names_only(none) for j in random) / max(1, len(random)), "random": len(random),
    }  # fmt: skip


def intruders(
    ev: Evidence,
    latents: Sequence[int],
    choose: Callable[[np.ndarray], np.ndarray],
    strong: bool = False,
    trials: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of finding the odd one of five, mean over latents, and chance.

    ``choose`` maps sets to places; ``strong`` takes positives of the stronger half of the quantiles alone.
    """
    at = np.array(latents, np.int64)
    s = Subjects(ev, "image", Names(at, [""] * len(at), np.ones(len(at), bool)))
    if strong:
        upper = ev.quantiles("image", "test")
        upper = upper[at, : upper.shape[1] // 2].reshape(len(at), -1)
        s.positive = np.take_along_axis(upper, np.argsort(upper < 0, 1, kind="stable"), 1)
    found = intruder_scores(s, choose, 5, trials, seed)
    return {"accuracy": float(np.nanmean(found.value)) if len(at) else float("nan"), "chance": found.chance}


def by_embeddings(table: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A judge that takes the item whose embedding ``(n, width)`` is least like the others'."""
    return lambda sets: farthest(sets, table)


def by_concepts(truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A scripted judge that sees the true concepts ``(n, C)``: the odd one lacks the concept that the others share.

    Of several concepts the rarest decides, for which it is least likely by chance; where no concept is shared by all
    others, that which most of them share.
    """
    rarity = -np.log(np.clip(truth.mean(0), 1e-9, 1))

    def choose(sets: np.ndarray) -> np.ndarray:
        out = np.zeros(sets.shape[:2], int)
        for row, trials in enumerate(sets):
            has = truth[trials.clip(0)].astype(np.float32)  # (trials, size, C)
            others = (has.sum(1, keepdims=True) - has) / (has.shape[1] - 1)
            out[row] = ((others - has) * rarity).max(2).argmax(1)
        return out

    return choose

"""What is true of latents in the generated world, and whether their names say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.guesses import Candidates
from mmsae.interpret.names.unseen import unseen
from mmsae.interpret.scores.vectors import farthest
from mmsae.metrics.concepts.concepts import f1_table, thresholds
from mmsae.metrics.concepts.names import LatentName, names_only
from mmsae.world.generator.scene import CONCEPTS

CLEAR = 0.8  # F1 with a concept from which on a latent has a meaning that its name must say
TENTHS, SIZE = 10, 5  # of a latent's values, and items of a set with an intruder
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
    dealt: bool = False,
    each: int = 4,
    seed: int = 0,
) -> np.ndarray:
    """``(L, 10)`` shares of sets of five in which the odd one is found, by tenth of a latent's values, strongest first.

    A set is of four unseen items of one tenth, so that strength does not give the odd one away, and of one on which the
    latent is silent. NaN for tenths of fewer than four items. Chance is .2.

    Args:
        ev: Evidence of images.
        latents: L latents.
        choose: Maps sets ``(L, trials, 5)`` to places.
        dealt: Whether all these items are dealt to the sets anew at random: a control at chance.
        each: Sets of each tenth.
        seed: Seed.
    """
    own, rng = unseen(ev, "image", np.array(latents, np.int64), seed), np.random.default_rng(seed)
    sets, odd = np.full((len(latents), TENTHS, each, SIZE), -1), np.zeros((len(latents), TENTHS, each), int)
    for row, (items, silent) in enumerate(zip(own.positive, own.negative, strict=True)):
        silent = silent[silent >= 0]
        for tenth, part in enumerate(np.array_split(items[items >= 0], TENTHS)):
            if len(part) >= SIZE - 1 and len(silent):
                for trial in range(each):
                    shown = np.append(rng.choice(part, SIZE - 1, replace=False), rng.choice(silent))
                    order = rng.permutation(SIZE)
                    sets[row, tenth, trial], odd[row, tenth, trial] = shown[order], int((order == SIZE - 1).argmax())
    has = sets[..., 0] >= 0
    if dealt:
        sets[has] = rng.permutation(sets[has].ravel()).reshape(-1, SIZE)
    found = choose(sets.reshape(len(latents), TENTHS * each, SIZE)).reshape(odd.shape)
    return np.where(has.any(2), (found == odd).mean(2), np.nan)


def by_embeddings(table: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A judge that takes the item whose embedding ``(n, width)`` is least like the others'."""
    return lambda sets: farthest(sets, table)


def by_concepts(truth: np.ndarray, keep: float = 0.9) -> Callable[[np.ndarray], np.ndarray]:
    """A scripted judge that sees the true concepts ``(n, C)`` and weighs what may be the case, by Bayes' rule.

    Four of the items may share any one concept, or its absence, each of them with the chance ``keep``, and the fifth
    has it as often as any item does. All concepts and all places of the fifth are as likely before; the place that is
    likeliest after is taken.
    """
    often = truth.mean(0).clip(1e-6, 1 - 1e-6)
    has, often = np.concatenate([truth, ~truth], 1), np.concatenate([often, 1 - often])
    gains = np.log((1 - keep) / (1 - often)), np.log(keep / often)

    def choose(sets: np.ndarray) -> np.ndarray:
        out = np.zeros(sets.shape[:2], int)
        for row, trials in enumerate(sets):
            gain = np.where(has[trials.clip(0)], gains[1], gains[0])  # (trials, size, 2 C)
            out[row] = logsumexp(gain.sum(1, keepdims=True) - gain, axis=2).argmax(1)
        return out

    return choose

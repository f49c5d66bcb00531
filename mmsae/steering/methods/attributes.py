"""Which attribute does a feature set? Words for what steering changes in images, without a person looking.

The gain of every word of a vocabulary is compared with its gains under random features at the same norm, and by that
with the other words, then confirmed by a choice between two images of held-out prompts. The goal is that of arXiv
2508.11277, whose loop was not published in detail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.metrics.statistics import Interval, interval
from mmsae.steering.measure.scorers import Judge
from mmsae.types import InputError

THRESHOLD = 3.0


class SteeredPairs(NamedTuple):
    """Images without and with a feature, same noise and prompt in each row."""

    before: Tensor  #: ``(n, 3, H, W)`` in [0, 1], or whatever the judge embeds.
    after: Tensor  #: The same images, steered.
    prompts: Sequence[str]  #: The ``n`` prompts.


class Attribute(NamedTuple):
    """A word that a feature may stand for."""

    word: str  #: From the vocabulary.
    gain: float  #: Mean change of its cosine with the images.
    #: Its ``z_random`` against those of the other words, itself left out: the largest of n cannot reach 3 deviations of
    #: all n unless n > 11.
    z_words: float
    z_random: float  #: Against random features at the same norm, gains taken relative to the vocabulary's mean.
    #: Share of held-out pairs in which the steered image is chosen, its interval over prompts; None before confirm().
    choice: Interval | None = None

    @property
    def confirmed(self) -> bool:
        """Whether the choice lies above chance with its whole interval."""
        return self.choice is not None and self.choice.low > 0.5


def gains(judge: Judge, pairs: SteeredPairs, vocabulary: Sequence[str]) -> Tensor:
    """``(V,)`` mean over pairs of ``cos(I', t) - cos(I, t)``."""
    return ((judge.images(pairs.after) - judge.images(pairs.before)) @ judge.texts(vocabulary).T).mean(0)


def score_words(gain: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """``z_words (V,)`` and ``z_random (V,)``: words against each other and against random features.

    Whatever is pushed moves images towards some words (in a small model towards those of what images look like when
    they break), and some words' cosines vary more than others'. So ``z_random`` is a word's gain about the vocabulary's
    mean, in standard deviations of the same under random features, and ``z_words`` compares words by that, not by their
    gains: else the words that anything gains hide the one that only this feature does.

    Args:
        gain: ``(V,)`` of the feature, V > 2.
        random: ``(R, V)`` of R > 1 random live features at the same relative norm.

    Raises:
        InputError: Too few words or random features to have a deviation.
    """
    v = len(gain)
    if v < 3 or len(random) < 2:
        raise InputError(f"attributes need 3 words and 2 random features to compare with, not {v} and {len(random)}.")
    g = gain.double()
    own, other = g - g.mean(), random.double() - random.double().mean(1, keepdim=True)
    z = (own - other.mean(0)) / other.std(0).clamp(min=1e-12)
    mean = (z.sum() - z) / (v - 1)  # of the other words
    spread = (((z.square().sum() - z.square()) / (v - 1) - mean.square()).clamp(min=0) * (v - 1) / (v - 2)).sqrt()
    return (z - mean) / spread.clamp(min=1e-12), z


def discover(
    judge: Judge,
    pairs: SteeredPairs,
    random: Iterable[SteeredPairs],
    vocabulary: Sequence[str],
    threshold: float = THRESHOLD,
) -> list[Attribute]:
    """The words that a feature moves images towards, best first; empty where no word stands out both ways.

    Args:
        judge: Embeds images and words; not the model that is steered.
        pairs: Images under the feature.
        random: Images under each of R random live features, at the same relative norm, prompts and noise.
        vocabulary: Candidate words or phrases.
        threshold: Both standard scores must exceed it.
    """
    gain = gains(judge, pairs, vocabulary)
    z_words, z_random = score_words(gain, torch.stack([gains(judge, r, vocabulary) for r in random]))
    found = [Attribute(w, *map(float, values)) for w, *values in zip(vocabulary, gain, z_words, z_random, strict=True)]
    return sorted((a for a in found if min(a.z_words, a.z_random) > threshold), key=lambda a: -a.z_words)


Choose = Callable[[Tensor, Tensor, str], Tensor]  # (n,3,H,W) twice and a word -> (n,) 1 where the second is chosen


def clip_choice(judge: Judge) -> Choose:
    """Chooses the image that is closer to the word; .5 where both are equally close."""

    def choose(first: Tensor, second: Tensor, word: str) -> Tensor:
        t = judge.texts([word])[0]
        a, b = judge.images(first) @ t, judge.images(second) @ t
        return (b > a).double() + (a == b).double() / 2

    return choose


def confirm(found: Sequence[Attribute], held_out: SteeredPairs, choose: Choose, seed: int = 0) -> list[Attribute]:
    """Two-alternative choice on prompts that had no part in the discovery.

    ``choose`` is :func:`clip_choice`, or a visual-question model. It sees the two images in random order.
    """
    swap = torch.rand(len(held_out.before), generator=torch.Generator().manual_seed(seed)) < 0.5
    at = swap.to(held_out.before.device).view(-1, *[1] * (held_out.before.dim() - 1))
    first, second = (torch.where(at, a, b) for a, b in (held_out[1::-1], held_out[:2]))
    out = []
    for a in found:
        chosen = choose(first, second, a.word).double().cpu()
        out.append(a._replace(choice=interval(torch.where(swap, 1 - chosen, chosen).numpy(), held_out.prompts)))
    return out

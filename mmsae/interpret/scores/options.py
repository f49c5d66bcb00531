"""Options of ``mmsae score``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Judging:
    """What is scored, and how."""

    scorers: tuple[str, ...] = ()
    """Any of judge, judge_crops, embedding, simulation, example_embedding, intruder, and with a client detection,
    fuzzing, simulation_asked, intruder_asked, pointing, surprisal, intervention; default: all that the evidence and
    the client allow, but judge_crops and intervention, which have to be named."""
    judge: str = ""
    """Host whose embeddings judge images, another than the one that is explained; default: the embeddings of the
    evidence."""
    negatives: Literal["random", "hard"] = "random"
    """What unseen items are told from: silent items drawn at random, or those most like the ones on which a latent
    fires. Scores of the two are not comparable."""
    set_size: int = 5
    """Items in a set with an intruder; chance is 1 over it."""
    trials: int = 20
    """Sets of each latent; a client is asked about six."""
    each: int = 10
    """Positives, and as many negatives, that a client is asked about for each latent."""
    templates: str = "simple"
    """Prompt templates of names for images: simple, openai, or a file."""
    seed: int = 0
    """Seed of draws and of the shuffled names."""
    report: bool = True
    """Whether to write the page."""

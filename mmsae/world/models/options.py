"""Options of what trains the world's models."""

from __future__ import annotations

from dataclasses import dataclass

from mmsae.options import Data


@dataclass(frozen=True)
class Training:
    """How to train."""

    steps: int = 300
    """Number of optimiser steps."""
    batch_size: int = 32
    """Number of images a step, at most as many as there are."""
    seed: int = 0
    """Seed of weights, order and all that is drawn."""
    lr: float = 0.01
    """Peak learning rate of Muon, for matrices and convolution kernels."""
    adam_lr: float = 3e-3
    """Peak learning rate of AdamW, for embeddings, norms and biases."""
    weight_decay: float = 0.05
    """Decoupled weight decay of everything of two or more dimensions."""


@dataclass(frozen=True)
class Texts:
    """The text encoder."""

    text_width: int = 64
    """Width of the text encoder, a multiple of 32."""
    text_layers: int = 2
    """Number of its layers."""
    context_length: int | None = None
    """Number of tokens of a text; longer captions lose their last words. Default: the longest caption and its end mark,
    between 16 and 40."""
    max_words: int = 20_000
    """Size of the vocabulary: the most frequent words; others read as ``<unk>``."""


@dataclass(frozen=True)
class PairData(Data):
    """What is made of the samples' files."""

    max_gigabytes: float = 4.0
    """Refuse data whose decoded images need more memory."""


@dataclass(frozen=True)
class TrainRun:
    """Where to train, and what becomes of OUT."""

    device: str = "cpu"
    """Where to train."""
    threads: int | None = None
    """Number of CPU threads. Default: one where the operations are too small to share, as those of images up to 64
    pixels (on a busy machine two threads are slower than one by a factor of three), else torch's own number."""
    overwrite: bool = False
    """Replace a model that is already in OUT."""
    progress: bool = True
    """Whether to print what is done and show bars."""


@dataclass(frozen=True)
class ResumedRun(TrainRun):
    """Where to train, and what becomes of OUT."""

    checkpoint_every: int = 100
    """Number of steps between two writes of OUT.partial; 0 writes none."""

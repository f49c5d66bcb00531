"""Options of ``mmsae filter``; see :mod:`mmsae.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scoring:
    """How samples are scored."""

    score: str = "pair_weighted"
    """What to keep by. CLIP-like hosts: clip, clip_centred, pair_code, pair_weighted, pair_calibrated, random;
    vision-language LLMs: cos_code, cos_algorithm, cos_mean, l0, l1, co_l0, co_l1; both, and SAEs of images alone:
    random, and query with ``--query``, by which the latter choose where nothing is said."""
    weights: str = "auto"
    """File of fitted weights (an earlier OUT/pair_weights.safetensors; for the ``cos`` scores a folder that ``mmsae
    weights`` wrote), or ``auto``: fit them on a sample."""
    calibration: str | list[str] | None = None
    """Clean shards to fit weights on instead of a sample of the input; needed for pair_calibrated."""
    fit_samples: int = 20_000
    """Samples that weights are fitted on, in whole tars drawn by ``seed``."""
    names: str | None = None
    """``names.json`` of ``mmsae name``, or a JSON file ``{latent: name}``; other latents are called by the words of
    their top captions."""
    text: Literal["question", "question+answer"] = "question"
    """Which text vision-language LLMs score: ``question``: the prompt alone (json's ``question``, or the caption), as
    published; ``question+answer``: with json's ``answer``."""
    seed: int = 0
    """Seed of the sample that weights are fitted on, of the calibrator and of ``random``."""


@dataclass(frozen=True)
class Keeping:
    """Which samples are kept, and how they are written."""

    keep: float | str | None = None
    """Share of the usable samples that is kept, above 0 and at most 1; with ``query`` the share of those of which it
    holds. Default: .5, and 1 with ``query``. Or a file of uids (``uids.npy`` of ``mmsae filter``, or DataComp's): only
    samples whose uid it lists are used, and ``share`` of them are kept."""
    share: float | None = None
    """Where ``keep`` is a file: share of its samples that is kept. Default: 1."""
    query: str | None = None
    """File ``query.json`` over this SAE's latents, as the browser saves it: only samples of which it holds are kept,
    and every one gets a column ``query``, how well it fits. A latent without ``image:`` or ``text:`` before it may fire
    on either side."""
    select: Literal["top", "match", "cover"] = "top"
    """``top``: the highest scores. ``match``: the set whose concepts are distributed as in ``target``. ``cover``: the
    set that covers most concepts."""
    target: str | list[str] | None = None
    """Shards with the concepts wanted, for ``select: match``."""
    select_on: Literal["image", "text"] = "image"
    """Whose codes are the concepts of a sample, for ``match`` and ``cover``."""
    balance: float = 1.0
    """Weight of the concepts (``match`` and ``cover``); the rest goes to samples in the best third by ``score``."""
    swap: bool = True
    """Whether swaps that lower the KL to the target improve the greedy choice (``match``)."""
    per_shard: int = 1000
    """Samples in a written shard."""
    compress: bool = False
    """Write ``.tar.gz``."""
    report: bool = True
    """Whether to write ``report.html`` too."""

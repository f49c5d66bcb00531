"""Finding pairs whose caption does not fit: AUROC of clean against damaged pairs, for every pair score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.metrics.correlation import PairScorer
from mmsae.metrics.ranking import auroc
from mmsae.types import Codes, InputError


class Side(NamedTuple):
    """N rows of one modality.

    Attributes:
        codes: Their codes.
        x: ``(N, d)`` their host embeddings, or None to leave out the host's own scores.
    """

    codes: Codes
    x: Tensor | None = None

    def rows(self, which: Tensor) -> Side:
        """Some of the rows."""
        return Side(self.codes.rows(which), None if self.x is None else self.x[which])


@torch.no_grad()
def pair_scores(scorer: PairScorer, image: Side, text: Side) -> dict[str, Tensor]:
    """``{name: (N,)}`` scores of N pairs, larger for better fits: ``pair_code`` and ``pair_weighted``.

    With ``clip`` and ``clip_centred`` where both sides have embeddings and the scorer was fitted with embeddings.
    """
    scores = scorer.codes(image.codes, text.codes)
    if scorer.mean_image is not None and image.x is not None and text.x is not None:
        scores |= scorer.embeddings(image.x, text.x)
    return scores


def mismatch(scorer: PairScorer, image: Side, clean: Side, damaged: Side) -> dict[str, float]:
    """AUROC of telling clean pairs from damaged ones, per pair score; .5 is chance.

    Args:
        scorer: Fitted on training pairs.
        image: N images.
        clean: Their N true captions.
        damaged: N wrong captions for the same images: swapped (``clean.rows(derangement(N, seed, same))``) or changed.

    Raises:
        InputError: Row counts differ.
    """
    if not image.codes.n == clean.codes.n == damaged.codes.n:
        raise InputError(
            f"{image.codes.n} images, {clean.codes.n} clean and {damaged.codes.n} damaged captions are not pairs"
        )
    good, bad = pair_scores(scorer, image, clean), pair_scores(scorer, image, damaged)
    return {name: auroc(good[name], bad[name]) for name in good}

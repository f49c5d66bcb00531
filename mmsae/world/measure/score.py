"""Everything that is measured of an SAE on the generated world, where the truth about every sample is known.

Definitions (all scores on held-out renders): concepts are the 23 of scenes of one object; latents and thresholds are
matched on training renders. ``same`` asks for one latent in both modalities and takes the lower of its two scores. A
damaged caption differs from the true one in one attribute of object 0; a swapped one belongs to another sample.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.zeroshot.head import zero_shot
from mmsae.evaluation.zeroshot.scores import class_embeddings
from mmsae.filtering.truth import Side, mismatch
from mmsae.metrics.concepts.concepts import concept_report
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.metrics.pairs.pairs import derangement, pair_report
from mmsae.metrics.pairs.retrieval import groups_of
from mmsae.metrics.reconstruction import fvu
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, Codes
from mmsae.world.generator.scene import COLOURS, CONCEPT_GROUPS, CONCEPTS, SHAPES, Scenes, concept_matrix

#: The concepts of scenes of one object, and their groups.
LONE_GROUPS = [g for g, names in CONCEPT_GROUPS.items() if g != "relation" for _ in names]
LONE_CONCEPTS = CONCEPTS[: len(LONE_GROUPS)]


class WorldPairs(NamedTuple):
    """Host embeddings of some samples of the world, with what is true of them."""

    x: dict[str, Tensor]  #: ``{modality: (n, d)}`` raw host embeddings, row i of each belongs to scene i
    scenes: Scenes  #: The scenes
    captions: list[str]  #: The ``n`` full captions

    @property
    def alone(self) -> Tensor:
        """``(n,)`` bool: scenes of one object."""
        return torch.from_numpy(~self.scenes.two)

    def truth(self) -> Tensor:
        """``(n, 23)`` bool."""
        return torch.from_numpy(concept_matrix(self.scenes)[:, : len(LONE_CONCEPTS)])

    def colour_shape(self) -> Tensor:
        """``(n,)`` int64 class of object 0 among the 30 pairs of colour and shape."""
        shape, colour = (torch.from_numpy(self.scenes.objects[:, 0, i]).long() for i in (0, 1))
        return colour * len(SHAPES) + shape


@torch.no_grad()
def encode_pairs(sae: SAE, pairs: WorldPairs) -> dict[str, Codes]:
    """``{modality: codes}`` of all pairs."""
    return {m: sae.encode(pairs.x[m], m) for m in (IMAGE, TEXT)}


@torch.no_grad()
def score_sae(
    sae: SAE,
    train: WorldPairs,
    test: WorldPairs,
    damaged: Tensor,
    embed: Callable[[list[str]], Tensor],
    retrieval: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one SAE; matching, correlations and alpha are fitted on ``train``, scores are of ``test``.

    Args:
        sae: A trained SAE of both modalities.
        train: Training renders.
        test: Held-out renders.
        damaged: ``(n, d)`` raw text embeddings of the held-out captions with one attribute of object 0 changed.
        embed: Texts to raw text embeddings.
        retrieval: Held-out pairs that compete in retrieval.
        seed: Seed of the shuffled and swapped pairs.
    """
    z_train, z = encode_pairs(sae, train), encode_pairs(sae, test)
    lone = {"train": train.alone, "test": test.alone}
    concepts = concept_report(
        {m: c.rows(lone["train"]) for m, c in z_train.items()}, train.truth()[lone["train"]],
        {m: c.rows(lone["test"]) for m, c in z.items()}, test.truth()[lone["test"]], LONE_CONCEPTS, LONE_GROUPS,
    )  # fmt: skip
    same = groups_of(test.captions)
    pairs = pair_report(z[IMAGE], z[TEXT], same=same, seed=seed)
    head = slice(0, retrieval)
    recall = pair_report(z[IMAGE].rows(head), z[TEXT].rows(head), same=same[head], seed=seed)["recall_at_1"]
    scorer = PairScorer.fit(z_train[IMAGE], z_train[TEXT], train.x[IMAGE], train.x[TEXT])
    image, clean = Side(z[IMAGE], test.x[IMAGE]), Side(z[TEXT], test.x[TEXT])
    wrong = {
        "swap": clean.rows(derangement(len(same), seed, same)),
        "attribute": Side(sae.encode(damaged, TEXT), damaged),
    }
    nouns = [f"{c} {s}" for c, s in product(COLOURS, SHAPES)]
    return {
        "fvu": {m: fvu(sae.decode(c, m), test.x[m]) for m, c in z.items()},
        **concepts,
        **{k: pairs[k] for k in ("top_concept_agreement", "code_cosine", "dead_fraction", "bimodal", "warnings")},
        "recall_at_1": recall,
        "mismatch": {kind: mismatch(scorer, image, clean, side) for kind, side in wrong.items()},
        "zero_shot": zero_shot(
            sae,
            test.x[IMAGE][lone["test"]],
            test.colour_shape()[lone["test"]],
            class_embeddings(embed, nouns, ["a {}"]),
            (train.x[IMAGE][lone["train"]], train.colour_shape()[lone["train"]]),
        ),
    }

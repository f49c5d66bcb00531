"""Other conditions of the generated world: a host that learned from damaged captions, captions that leave words out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsae.activations import ActivationStore
from mmsae.bench.multimodal.data import World
from mmsae.demo.stages import SEEDS
from mmsae.filtering.truth import Side, mismatch, pair_scores
from mmsae.hosts import Host
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.metrics.pairs.retrieval import groups_of
from mmsae.metrics.reconstruction import fvu
from mmsae.metrics.statistics import auroc
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT
from mmsae.world.generator.captions import damage, full_captions, partial_captions
from mmsae.world.generator.data import generate
from mmsae.world.generator.scene import change_one, sample_scenes
from mmsae.world.generator.shards import write_samples
from mmsae.world.measure.host import embed_texts

NOISY_SEED, DAMAGED = 21, 0.3  #: Seed of the noisy world, and its share of captions with one wrong attribute.
CHOSEN = 3000  #: Pairs of the noisy world on which L0 is measured.


def write_noisy(out: Path, n: int) -> None:
    """Shards of ``n`` samples without siblings, a share of them with one wrong attribute of the first object."""
    data = generate(n, NOISY_SEED, siblings=False)
    wrong = np.random.default_rng([NOISY_SEED, 9]).random(n) < DAMAGED
    texts = np.where(wrong, damage(data.scenes, NOISY_SEED)[0], data.full).tolist()
    write_samples(out, "noisy", data.images, texts, [{"uid": u} for u in data.uids], digits=7)


class NoisyWorld:
    """A world that host and SAE learn from as it is, and of which they are then asked which pairs are damaged.

    ``store`` holds the embeddings of :func:`write_noisy`'s shards.
    """

    def __init__(self, store: Path) -> None:
        held = ActivationStore(store)
        self.train = {m: held.load(modality=m) for m in (IMAGE, TEXT)}
        self.choose = {m: x[:CHOSEN] for m, x in self.train.items()}
        self.same = groups_of(held.captions[:CHOSEN])
        true = full_captions(sample_scenes(len(held.captions), NOISY_SEED, siblings=False))
        self.wrong = torch.tensor([told != said for told, said in zip(true, held.captions, strict=True)])
        self.host: dict[str, float] = {}

    @torch.no_grad()
    def score(self, sae: SAE) -> dict[str, Any]:
        """AUROC of every pair score on the very pairs that everything was fitted on, and the error on them."""
        x = self.train
        z = {m: sae.encode(rows, m) for m, rows in x.items()}
        scorer = PairScorer.fit(z[IMAGE], z[TEXT], x[IMAGE], x[TEXT])
        scores = pair_scores(scorer, Side(z[IMAGE], x[IMAGE]), Side(z[TEXT], x[TEXT]))
        found = {name: auroc(values[~self.wrong], values[self.wrong]) for name, values in scores.items()}
        return {f"fvu_{m}": fvu(sae.decode(c, m), x[m]) for m, c in z.items()} | _auroc_columns(found)


class PartialWorld:
    """The world's pairs; the captions that are scored leave out attributes, and wrong ones have one other word.

    Every attribute is left out with probability .3. Where the changed one is, there is nothing to find, and the pair is
    left out.
    """

    def __init__(self, world: World, host: Host) -> None:
        self.train, self.choose, self.same, self.host = world.train, world.choose, world.same, {}
        scenes, seed = world.test.scenes, SEEDS["test"]
        clean = partial_captions(scenes, seed)
        wrong = partial_captions(change_one(scenes, SEEDS["damage"], which_object=0), seed)
        use = [i for i, (c, w) in enumerate(zip(clean, wrong, strict=True)) if c != w]
        self.image = world.test.x[IMAGE][use]
        self.clean, self.wrong = (embed_texts(host, [texts[i] for i in use]) for texts in (clean, wrong))

    @torch.no_grad()
    def score(self, sae: SAE) -> dict[str, Any]:
        """AUROC of every pair score, fitted on pairs with full captions."""
        x = self.train
        scorer = PairScorer.fit(*(sae.encode(x[m], m) for m in (IMAGE, TEXT)), x[IMAGE], x[TEXT])

        def side(rows: Tensor, modality: str) -> Side:
            return Side(sae.encode(rows, modality), rows)

        return _auroc_columns(mismatch(scorer, side(self.image, IMAGE), side(self.clean, TEXT), side(self.wrong, TEXT)))


def _auroc_columns(found: dict[str, float]) -> dict[str, float]:
    names = {"wrong_code": "pair_code", "wrong_weighted": "pair_weighted", "wrong_host": "clip"}
    return {column: found[name] for column, name in (names | {"wrong_centred": "clip_centred"}).items()}

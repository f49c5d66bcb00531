"""Pairs of two sources, each with rows to train on, rows to choose on, and rows that are only scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmsae.activations import ActivationStore, extract
from mmsae.demo.scores import world_pairs
from mmsae.demo.stages import SEEDS
from mmsae.evaluation.zeroshot.head import zero_shot
from mmsae.evaluation.zeroshot.scores import pool_templates
from mmsae.filtering.truth import Side, mismatch
from mmsae.hosts import Host, load_host
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.metrics.pairs.pairs import derangement, pair_report
from mmsae.metrics.pairs.retrieval import both_ways, groups_of
from mmsae.metrics.reconstruction import fvu
from mmsae.sae import SAE
from mmsae.shards import FaultLog, expand, read_shard
from mmsae.types import IMAGE, TEXT, InputError
from mmsae.world.generator.captions import damage
from mmsae.world.measure.host import embed_texts
from mmsae.world.measure.score import WorldPairs, score_sae

MAX_PROMPTS = 64  # captions that make one class embedding
RETRIEVAL = 1000  # held-out pairs of the world that compete in retrieval


class Pairs(Protocol):
    """Pairs on which multimodal SAEs are compared."""

    train: Mapping[str, Tensor]  #: ``{modality: (N, d)}`` raw host embeddings, row i of each is a pair.
    choose: Mapping[str, Tensor]  #: Others, by which strengths and the default are chosen.
    same: Tensor  #: ``(n,)`` ids of equal captions of the rows to choose on.
    host: Mapping[str, float]  #: Figures of the host itself, equal for all SAEs.

    def score(self, sae: SAE) -> dict[str, Any]:
        """Figures on rows that were kept from everything else, as plain numbers."""


class World:
    """The generated world seen by a CLIP: 16,000 pairs to train on, 4,000 to choose on, others that are scored."""

    def __init__(self, train: Path, test: Path, host: Host, sizes: tuple[int, int]) -> None:
        pairs, self.test = world_pairs(train, sizes[0], SEEDS["train"]), world_pairs(test, sizes[1], SEEDS["test"])
        n = sizes[0] * 4 // 5
        self.fitted, self.chosen = _part(pairs, slice(0, n)), _part(pairs, slice(n, None))
        self.train, self.choose = self.fitted.x, self.chosen.x
        self.same = groups_of(self.chosen.captions)
        head = {m: x[:RETRIEVAL] for m, x in self.test.x.items()}
        found = both_ways(head[IMAGE], head[TEXT], groups_of(self.test.captions[:RETRIEVAL]), (1,))
        self.host = {"recall_host": sum(way[1] for way in found.values()) / len(found)}
        self._embed = lambda texts: embed_texts(host, texts)
        self._damaged = self._embed(damage(self.test.scenes, SEEDS["damage"])[0])

    def score(self, sae: SAE) -> dict[str, Any]:
        """Figures on held-out renders; latents and thresholds are matched on the pairs to choose on."""
        s = score_sae(sae, self.chosen, self.test, self._damaged, self._embed, RETRIEVAL)
        return {
            "fvu_image": s["fvu"][IMAGE],
            "fvu_text": s["fvu"][TEXT],
            "pair": s["code_cosine"]["pair"],
            "shuffled": s["code_cosine"]["shuffled"],
            "bimodal": s["bimodal"]["latents"],
            "bimodal_energy": s["bimodal"]["energy"],
            "f1_image": s["concept_f1"][IMAGE],
            "f1_text": s["concept_f1"][TEXT],
            "f1_same": s["concept_f1"]["same"],
            "auc_same": s["concept_auc"]["same"],
            "agreement": s["top_concept_agreement"],
            "recall": s["recall_at_1"],
            "dead": s["dead_fraction"],
            "wrong_code": s["mismatch"]["attribute"]["pair_code"],
            "wrong_weighted": s["mismatch"]["attribute"]["pair_weighted"],
            "wrong_host": s["mismatch"]["attribute"]["clip"],
            "zero_shot": s["zero_shot"]["code"],
            "zero_shot_host": s["zero_shot"]["raw"],
        }


def _part(pairs: WorldPairs, rows: slice) -> WorldPairs:
    at = torch.arange(len(pairs.captions))[rows].numpy()
    x = {m: v[rows] for m, v in pairs.x.items()}
    return WorldPairs(x, pairs.scenes.rows(at), pairs.captions[rows])


class Split(NamedTuple):
    """Pairs of some shards."""

    x: dict[str, Tensor]  #: ``{modality: (n, d)}`` raw host embeddings.
    captions: list[str]  #: The n captions.
    labels: Tensor  #: ``(n,)`` int64 classes.


def classes_of(paths: Sequence[str]) -> dict[str, Any]:
    """``{uid: class}`` of all samples: ``cls``, or ``class`` of json where there is none."""
    found, faults = {}, FaultLog()
    for path in paths:
        for s in read_shard(path, faults, need=("caption",), decode=False):
            found[s.uid] = s.cls if s.cls is not None else s.meta.get("class")
            if found[s.uid] is None:
                raise InputError(f"sample {s.key} of {path} has neither cls nor a class in its json")
    return found


def load_split(store: Path, paths: Sequence[str], classes: list | None = None) -> tuple[Split, list]:
    """A store with its classes, joined by uid; classes are numbered in the order of ``classes`` (default: sorted)."""
    activations, of = ActivationStore(store), classes_of(paths)
    classes = sorted(set(of.values())) if classes is None else classes
    number = {c: i for i, c in enumerate(classes)}
    if unknown := set(of.values()) - set(number):
        raise InputError(f"{paths[0]} and its like have class {min(unknown)}, the training shards do not")
    labels = torch.tensor([number[of[u]] for u in activations.uids])
    return Split({m: activations.load(modality=m) for m in (IMAGE, TEXT)}, activations.captions, labels), classes


def class_prompts(host: Host, train: Split, n: int) -> Tensor:
    """``(n, d)`` class embeddings: the different captions that the class has in training, each normalised, averaged."""
    rows = []
    for c in range(n):
        captions = sorted({train.captions[i] for i in (train.labels == c).nonzero()[:, 0].tolist()})[:MAX_PROMPTS]
        embedded = embed_texts(host, captions)
        rows.append(pool_templates(embedded[None])[0] * embedded.norm(dim=1).mean())
    return torch.stack(rows)


@torch.no_grad()
def score_split(sae: SAE, train: Split, val: Split, test: Split, prompts: Tensor) -> dict[str, Any]:
    """All figures of one SAE on the test shards; alpha from the validation shards, pair weights from training."""
    z_train, z = ({m: sae.encode(s.x[m], m) for m in (IMAGE, TEXT)} for s in (train, test))
    pairs = pair_report(z[IMAGE], z[TEXT], same=test.labels, x=test.x)  # shuffled: a caption of another class
    scorer = PairScorer.fit(z_train[IMAGE], z_train[TEXT], train.x[IMAGE], train.x[TEXT])
    image, text = Side(z[IMAGE], test.x[IMAGE]), Side(z[TEXT], test.x[TEXT])
    return {
        "fvu": {m: fvu(sae.decode(c, m), test.x[m]) for m, c in z.items()},
        **{k: v for k, v in pairs.items() if k != "recall_at_1"},
        "recall": {
            "class": pairs["recall"]["code"],
            "embedding": pairs["recall"]["embedding"],
            "caption": both_ways(z[IMAGE], z[TEXT], groups_of(test.captions)),
        },
        "wrong_class": mismatch(scorer, image, text, text.rows(derangement(len(test.labels), 0, test.labels))),
        "zero_shot": zero_shot(sae, test.x[IMAGE], test.labels, prompts, (val.x[IMAGE], val.labels)),
    }


class Photographs:
    """Photographs with captions that say their class; the last tenth of the training shards is kept to choose on."""

    def __init__(self, train: str, test: str, host: str, out: Path, progress: bool = True) -> None:
        paths = {"train": expand(train), "test": expand(test)}
        if len(paths["train"]) < 2:
            raise InputError(f"photographs: {train} is one shard, 2 are needed to keep one to choose on")
        kept = max(1, len(paths["train"]) // 10)
        paths |= {"train": paths["train"][:-kept], "val": paths["train"][-kept:]}
        model = load_host(host)
        for split, shards in paths.items():
            extract(model, shards, out / split, workers=0, progress=progress)
        self.fitted, classes = load_split(out / "train", paths["train"])
        self.val, self.test = (load_split(out / s, paths[s], classes)[0] for s in ("val", "test"))
        self.prompts = class_prompts(model, self.fitted, len(classes))
        self.train, self.choose, self.same = self.fitted.x, self.val.x, self.val.labels
        self.host: dict[str, float] = {}

    def score(self, sae: SAE) -> dict[str, Any]:
        """Figures on the test shards."""
        s = score_split(sae, self.fitted, self.val, self.test, self.prompts)
        recall = s["recall"]["class"]
        return {
            "fvu_image": s["fvu"][IMAGE],
            "fvu_text": s["fvu"][TEXT],
            "pair": s["code_cosine"]["pair"],
            "shuffled": s["code_cosine"]["shuffled"],
            "bimodal": s["bimodal"]["latents"],
            "bimodal_energy": s["bimodal"]["energy"],
            "agreement": s["top_concept_agreement"],
            "recall": sum(recall[way][1] for way in recall) / len(recall),
            "dead": s["dead_fraction"],
            "wrong_code": s["wrong_class"]["pair_code"],
            "wrong_weighted": s["wrong_class"]["pair_weighted"],
            "wrong_host": s["wrong_class"]["clip"],
            "zero_shot": s["zero_shot"]["code"],
            "zero_shot_host": s["zero_shot"]["raw"],
        }

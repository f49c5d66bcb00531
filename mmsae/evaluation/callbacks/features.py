"""Heads about features as callbacks of ``mmsae test``: monosemanticity, tree correlation, the nearest class mean.

Each is logged for ``raw`` activations and for the ``code``. States are float64 sums over ranks, so that one rank and
several report the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import one_hot

from mmsae.activations import ActivationStore
from mmsae.evaluation.callbacks.classify import image_site, log_figures, pooled_images, uids_of
from mmsae.evaluation.labels import Labels, read_labels
from mmsae.evaluation.ontology.measures import tree_correlation
from mmsae.evaluation.ontology.tree import Tree
from mmsae.metrics.concepts.class_means import ClassMeans, NearestMean
from mmsae.metrics.concepts.monosemanticity import Monosemanticity
from mmsae.sae import SAE
from mmsae.shards import expand
from mmsae.types import IMAGE, Codes, InputError, Tokens


def _views(sae: SAE, x: Tensor) -> dict[str, Tensor | Codes]:
    return {"raw": x, "code": sae.encode(x, IMAGE)}


def _widths(sae: SAE) -> dict[str, int]:
    return {"raw": sae.d_in[IMAGE], "code": sae.d_sae}


class MonosemanticityTest(Callback):
    """Monosemanticity on the test data: ``test/monosemanticity/code/mean``, ``above_chance``, ``dead`` and so on.

    Args:
        judge: Store of the same images by another host, joined by uid; empty: one unit vector per label.
        shards: Shards with the labels that stand in for a judge.
        label: ``cls`` or a field of json.
    """

    each_member = True

    def __init__(self, judge: str = "", shards: str | list[str] = "", label: str = "cls"):
        if bool(judge) == bool(shards):
            raise InputError(
                "MonosemanticityTest needs a judge (a store of another host) or shards with labels, one of"
            )
        self.judge, self.shards, self.label = judge, shards, label
        self.metrics: dict[str, Monosemanticity] = {}

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the judge."""
        sae: SAE = module.sae
        if self.judge:
            self.store = ActivationStore(self.judge)
            site = self.store.sites[IMAGE]
            if IMAGE in sae.sites and site.host == sae.sites[IMAGE].host:
                raise InputError(
                    f"the judge {self.judge} holds {site}, the SAE's own host: the score would be circular"
                )
            width = site.width
        else:
            self.known = read_labels(expand(self.shards), self.label)
            self.values = self.known.values_of(list(self.known.value))
            width = len(self.values)
        self.metrics = {k: Monosemanticity(f, width).to(module.device) for k, f in _widths(sae).items()}

    @torch.no_grad()
    def on_test_batch_end(self, trainer, module, outputs, batch: Tokens, batch_idx: int, dataloader_idx: int = 0):
        """Add a batch; images without a label are left out."""
        x, uids = pooled_images(batch, "MonosemanticityTest"), uids_of(batch, "MonosemanticityTest")
        if self.judge:
            e = self.store.load(modality=IMAGE, uids=uids).to(x.device)
        else:
            labels = self.known.numbers(uids, self.values).to(x.device)
            x, labels = x[labels >= 0], labels[labels >= 0]
            e = one_hot(labels, len(self.values)).to(x)
        for kind, features in _views(module.sae, x).items():
            self.metrics[kind].update(features, e)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        figures: dict[str, Any] = {}
        for kind, metric in self.metrics.items():
            figures |= {f"test/monosemanticity/{kind}/{k}": v for k, v in metric.compute().summary().items()}
        log_figures(module, figures)


class ClassMeansTest(Callback):
    """Classes in feature space: ``test/tree/code`` (tree correlation) and ``test/nearest_mean/code/top1``.

    Args:
        shards: What the store was extracted from: labels are read there.
        tree: File of node and parent, or ``wordnet``; empty: no tree correlation.
        train: Store of the same site whose images make the means of the nearest-mean classifier; empty: none.
        train_shards: Shards of the training set.
        label: ``cls`` or a field of json.
        draws: Permutations for the p-value of the tree correlation.
        batch_size: Rows at a time.
    """

    each_member = True

    def __init__(
        self,
        shards: str | list[str],
        tree: str = "",
        train: str = "",
        train_shards: str | list[str] = "",
        label: str = "cls",
        draws: int = 200,
        batch_size: int = 4096,
    ):
        if bool(train) != bool(train_shards):
            raise InputError("ClassMeansTest needs train and train_shards together: labels are read from the shards")
        self.shards, self.tree, self.train, self.train_shards = shards, tree, train, train_shards
        self.label, self.draws, self.batch_size = label, draws, batch_size
        self.nearest: dict[str, NearestMean] = {}

    @torch.no_grad()
    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read labels; make the means of the training store, dealt out among the ranks."""
        sae: SAE = module.sae
        self.known = read_labels(expand(self.shards), self.label)
        self.values = self.known.values_of(list(self.known.value))
        n = len(self.values)
        self.means = {k: ClassMeans(n, f).to(module.device) for k, f in _widths(sae).items()}
        self.built = Tree.named(self.tree, self.values) if self.tree else None
        if self.train:
            fitted = {k: ClassMeans(n, f).to(module.device) for k, f in _widths(sae).items()}
            labels = read_labels(expand(self.train_shards), self.label)
            for x, y in self._stored(ActivationStore(self.train), labels, sae, trainer, module.device):
                for kind, features in _views(sae, x).items():
                    fitted[kind].update(features, y)
            self.nearest = {k: NearestMean(m.compute()).to(module.device) for k, m in fitted.items()}

    def _stored(self, store: ActivationStore, known: Labels, sae: SAE, trainer: pl.Trainer, device: torch.device):
        """``(x, labels)`` of this rank's share of a store of the same site."""
        name = image_site(store, sae, f"store {self.train}")
        labels = known.numbers(store.uids, self.values)
        mine = torch.arange(trainer.global_rank, len(labels), trainer.world_size)
        for rows in mine.split(self.batch_size):
            yield store.rows(name, rows).to(device), labels[rows].to(device)

    @torch.no_grad()
    def on_test_batch_end(self, trainer, module, outputs, batch: Tokens, batch_idx: int, dataloader_idx: int = 0):
        """Add a batch; images without a class are left out."""
        x = pooled_images(batch, "ClassMeansTest")
        labels = self.known.numbers(uids_of(batch, "ClassMeansTest"), self.values).to(x.device)
        for kind, features in _views(module.sae, x).items():
            self.means[kind].update(features, labels)
            if self.nearest:
                self.nearest[kind].update(features, labels)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        figures: dict[str, Any] = {}
        for kind in self.means:
            means = self.means[kind].compute().cpu()
            figures |= self._correlation(kind, means)
            if self.nearest:
                figures |= {f"test/nearest_mean/{kind}/{k}": v for k, v in self.nearest[kind].compute().items()}
        log_figures(module, figures)

    def _correlation(self, kind: str, means: Tensor) -> Mapping[str, float]:
        if self.built is None:
            return {}
        if absent := int(means.isnan().any(1).sum()):
            raise InputError(f"{absent} of {len(means)} classes have no test image: a tree correlation needs all")
        found = tree_correlation(self.built, means, self.draws)
        return {f"test/tree/{kind}": found["value"], f"test/tree/{kind}/p": found["p"]}

"""Heads as Lightning callbacks of ``mmsae test``, named by class path in YAML: training imports no task.

Their states are float64 sums over ranks, so that one rank and several report the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric

from mmsae.activations import ActivationStore
from mmsae.evaluation.labels import named_classes, read_labels, read_templates
from mmsae.evaluation.ood.detectors_sae import rarity
from mmsae.evaluation.zeroshot.head import text_classes
from mmsae.evaluation.zeroshot.scores import enhance, hits, zero_shot_scores
from mmsae.hosts import load_host
from mmsae.load import named_pair
from mmsae.metrics.host.ood import OODScores
from mmsae.sae import SAE
from mmsae.shards import expand
from mmsae.types import IMAGE, TEXT, Codes, InputError, Tokens


class ZeroShotAccuracy(Metric):
    """Top-1, top-5 and mean per class of several kinds of scores, from float64 sums."""

    full_state_update = False

    def __init__(self, kinds: Sequence[str], n_classes: int, **kwargs):
        super().__init__(**kwargs)
        self.kinds = tuple(kinds)
        zeros = torch.zeros(len(kinds), n_classes, dtype=torch.float64)
        self.add_state("top1", zeros, dist_reduce_fx="sum")
        self.add_state("top5", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("count", zeros[0].clone(), dist_reduce_fx="sum")

    def update(self, scores: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch: ``{kind: (B, C)}`` and ``(B,)`` classes."""
        n = len(self.count)
        for name, k in (("top1", 1), ("top5", 5)):
            new = [torch.bincount(labels, hits(scores[m], labels, k).double(), n) for m in self.kinds]
            setattr(self, name, getattr(self, name) + torch.stack(new))
        self.count = self.count + torch.bincount(labels, minlength=n)

    def compute(self) -> dict[str, Tensor]:
        """``{"raw/top1": ..., "raw/top5": ..., "raw/balanced": ...}``, and ``images``; nothing before any image."""
        if not self.count.sum():
            return {}
        out = {"images": self.count.sum()}
        for i, kind in enumerate(self.kinds):
            out[f"{kind}/top1"], out[f"{kind}/top5"] = (t[i].sum() / self.count.sum() for t in (self.top1, self.top5))
            out[f"{kind}/balanced"] = (self.top1[i] / self.count).nanmean()
        return out


def pooled_images(batch: Tokens, who: str) -> Tensor:
    """``(B, d)`` image activations of a batch with one row per image; a token site, or none of images, is refused."""
    if IMAGE not in batch.x or batch.position:
        raise InputError(f"{who} needs a store of a pooled image site")
    return batch.x[IMAGE]


def uids_of(batch: Tokens, who: str) -> list[str]:
    """Uids of a batch; a datamodule without them is refused."""
    if batch.uids is None:
        raise InputError(f"{who} needs the uids of the test data, which this datamodule does not give")
    return batch.uids


def image_site(store: ActivationStore, sae: SAE, what: str) -> str:
    """The name of the site of a store's images; a store of another site than the SAE's is refused."""
    name = store.spec.own(IMAGE, sae.sites)
    site = store.spec.sites[name]
    if IMAGE in sae.sites and not site.same(sae.sites[IMAGE]):
        raise InputError(f"{what} holds {site}, the SAE was trained on {sae.sites[IMAGE]}")
    return name


def log_figures(module: pl.LightningModule, figures: Mapping[str, Any]) -> None:
    """Log figures that are summed over ranks already, and print them once."""
    values = {k: float(v) for k, v in figures.items()}
    module.log_dict(values, sync_dist=False, batch_size=1)
    module.print("  ".join(f"{k} {v:.4g}" for k, v in values.items()))


class ZeroShotTest(Callback):
    """Zero-shot accuracy on the test data: ``test/zeroshot/raw/top1``, ``recon``, ``code``, ``enhanced``.

    The store must be of the embeddings of images and texts; labels are joined by uid, images without one left out.

    Args:
        shards: What the store was extracted from: labels are read there.
        classes: File of class names; empty: those of the data.
        templates: ``simple``, ``openai`` or a file.
        label: ``cls`` or a field of json.
        host: Host by name; empty: the one that the site names.
        alpha: Weight of the codes in ``enhanced``; ``mmsae zeroshot`` chooses one on held-out images.
    """

    each_member = True

    def __init__(
        self,
        shards: str | list[str],
        classes: str = "",
        templates: str = "simple",
        label: str = "cls",
        host: str = "",
        alpha: float = 0.2,
    ):
        self.shards, self.classes, self.templates, self.label = shards, classes, templates, label
        self.host, self.alpha = host, alpha
        self.metric: ZeroShotAccuracy | None = None

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read labels, embed class names."""
        sae: SAE = module.sae
        if TEXT not in sae.modalities or any(s.module != f"{m}.embed" for m, s in sae.sites.items()):
            sites = ", ".join(str(s) for s in sae.sites.values()) or "no site"
            raise InputError(f"ZeroShotTest needs an SAE of image.embed and text.embed, this one has {sites}")
        self.known = read_labels(expand(self.shards), self.label)
        self.named = named = named_classes(self.classes, self.known, expand(self.shards))
        host = load_host(named_pair(sae, self.host)[1])
        vectors = text_classes(host, named.names, read_templates(self.templates))
        self.vectors = vectors.to(module.device)
        kinds = ("raw", "recon", "code", "enhanced")
        self.metric = ZeroShotAccuracy(kinds, len(named.names)).to(module.device)

    @torch.no_grad()
    def on_test_batch_end(self, trainer, module, outputs, batch: Tokens, batch_idx: int, dataloader_idx: int = 0):
        x = pooled_images(batch, "ZeroShotTest")
        uids, known = uids_of(batch, "ZeroShotTest"), self.known.value
        labels = self.known.numbers(uids, self.named.values).to(x.device)
        some = torch.tensor([u not in known or known[u] is not None for u in uids], device=x.device)
        x, labels = x[some], labels[some]
        if bad := int((labels < 0).sum()):
            raise InputError(f"{bad} of {len(labels)} test images have no label in {self.shards} that is a class")
        scores = zero_shot_scores(module.sae, x, self.vectors)
        scores["enhanced"] = enhance(scores["raw"], scores["code"], self.alpha)
        self.metric.update(scores, labels)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        log_figures(module, {f"test/zeroshot/{k}": v for k, v in self.metric.compute().items()})


class OODTest(Callback):
    """OOD detection with the scores that need no labels: ``test/ood/recon/NAME/auroc`` and so on.

    The test data are the ID images; each OOD set is a store of the same site, dealt out among the ranks. ``recon`` is
    the relative reconstruction error, ``rarity`` the log-likelihood of which latents fire, with the firing rates of the
    training (which the checkpoint holds; without it ``rarity`` is left out).

    Args:
        ood: ``{name: store}``.
        near: Names of the near sets; means over near and over far sets are logged.
        batch_size: Rows at a time.
    """

    each_member = True

    def __init__(self, ood: dict[str, str], near: list[str] | None = None, batch_size: int = 4096):
        self.ood, self.near, self.batch_size = ood, near or [], batch_size
        if unknown := [n for n in self.near if n not in ood]:
            raise InputError(f"near names {unknown[0]!r}, the OOD sets are {', '.join(ood)}")
        self.metrics: dict[tuple[str, str], OODScores] = {}

    @torch.no_grad()
    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score this rank's share of the OOD stores."""
        sae: SAE = module.sae
        usage, scores = module.usage, ["recon"]
        at = usage.modalities.index(IMAGE)
        if usage.tokens[at] > 0:
            scores.append("rarity")
        self.rates = (usage.counts[at].double() + 1) / (usage.tokens[at].double() + 2)
        scale = {"recon": 0.1, "rarity": float(-(self.rates * self.rates.log()).sum()) or 1.0}
        self.metrics = {(s, n): OODScores(scale[s]).to(module.device) for s in scores for n in self.ood}
        for name, folder in self.ood.items():
            store = ActivationStore(folder)
            chosen = image_site(store, sae, f"OOD store {folder}")
            if not store.spec.pooled(chosen):
                raise InputError(f"OOD store {folder} is of a token site; OODTest needs one row per image")
            mine = range(trainer.global_rank, store.spec.rows[chosen], trainer.world_size)
            for lo in range(0, len(mine), self.batch_size):
                x = store.rows(chosen, torch.tensor(mine[lo : lo + self.batch_size])).to(module.device)
                self._add(sae, x, [name], ood=True)

    @torch.no_grad()
    def on_test_batch_end(self, trainer, module, outputs, batch: Tokens, batch_idx: int, dataloader_idx: int = 0):
        """Score a batch of ID images."""
        self._add(module.sae, pooled_images(batch, "OODTest"), list(self.ood), ood=False)

    def _add(self, sae: SAE, x: Tensor, names: Sequence[str], ood: bool) -> None:
        z: Codes = sae.encode(x, IMAGE)
        error = (x - sae.decode(z, IMAGE)).double().square().sum(1) / x.double().square().sum(1).clamp(min=1e-12)
        for (score, name), metric in self.metrics.items():
            if name in names:
                metric.update(-error if score == "recon" else rarity(z, self.rates), ood)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        figures: dict[str, float] = {}
        for (score, name), metric in self.metrics.items():
            if (m := metric.compute()) is not None:
                figures |= {f"test/ood/{score}/{name}/{k}": v for k, v in m._asdict().items()}
        for score in dict.fromkeys(s for s, _ in self.metrics):
            for group, names in (("near", self.near), ("far", [n for n in self.ood if n not in self.near])):
                values = [figures[k] for n in names if (k := f"test/ood/{score}/{n}/auroc") in figures]
                if values:
                    figures[f"test/ood/{score}/mean-{group}/auroc"] = sum(values) / len(values)
        log_figures(module, figures)

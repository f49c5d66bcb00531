"""timm hosts: image towers of any kind, e.g. DINOv2 ViTs, ConvNeXt and ResNet, with their classifier left in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from mmsae.hosts.encoders.encoder import Encoder
from mmsae.hosts.hooks import Port, Shadow, ShadowPort
from mmsae.types import IMAGE


class HeadShadow(Shadow):
    """Stands in for ``forward_head``; the functions see the pooled features, logits are taken from what they return."""

    def __call__(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.original(x, pre_logits=True)
        new = self.run(pooled)
        if pre_logits:
            return new
        if new is pooled:
            return self.original(x)
        found = self.original.__self__.get_classifier()
        if not isinstance(found, tuple):
            return found(new)
        # distilled: logits are the mean of two classifiers, one per token (DeiT, PiT) or both on the pooled features
        if x.ndim == 3 and torch.equal(pooled, (x[:, 0] + x[:, 1]) / 2):
            return self.original(x + (new - pooled)[:, None])
        return torch.stack([classifier(new) for classifier in found]).mean(0)


class TimmHost(Encoder):
    """A frozen timm model; ``image.embed`` (or ``image.pooled``) is what its classifier sees.

    Args: as :class:`~mmsae.hosts.base.Host`, with a model of ``timm.create_model``.
    """

    modalities = (IMAGE,)

    def config(self) -> dict[str, Any]:
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in self._data().items()}
        return {"architecture": self.model.pretrained_cfg.get("architecture"), "data": data}

    def _data(self) -> dict[str, Any]:
        """Timm's data configuration, which is of the checkpoint, at the size that this model was built for."""
        data = resolve_model_data_config(self.model)
        size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        return data if size is None else {**data, "input_size": (data["input_size"][0], *size)}

    def transform(self, train: bool = False) -> Callable:
        return create_transform(**self._data(), is_training=train)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    @cached_property
    @torch.no_grad()
    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """Whether the classifier is linear in the embeddings is found by trying it."""
        layer = self.model.get_classifier()
        if not isinstance(layer, nn.Linear):
            return None
        x = torch.rand(self.probe_input(IMAGE, 2).shape, generator=torch.Generator().manual_seed(0))
        features = self.model.forward_features(x.to(self.device))
        logits, pooled = self.model.forward_head(features), self.model.forward_head(features, pre_logits=True)
        linear = isinstance(logits, Tensor) and pooled.shape[1:] == layer.weight.shape[1:]
        if not linear or not torch.allclose(layer(pooled), logits, rtol=1e-3, atol=1e-4):
            return None
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
        return layer.weight.float().cpu(), bias.float().cpu()

    def endpoint(self, name: str) -> Port:
        return ShadowPort(self.model, "forward_head", HeadShadow)

    def channels_last(self) -> bool:
        return getattr(self.model, "output_fmt", "") == "NHWC"

    def probe_input(self, modality: str, n: int) -> Tensor:
        return torch.zeros(n, *self._data()["input_size"])

    def prefix(self, modality: str) -> tuple[int, int | None]:
        embed = getattr(self.model, "patch_embed", None)
        return getattr(self.model, "num_prefix_tokens", 0), getattr(embed, "num_patches", None)

    def has_cls(self, modality: str) -> bool:
        return self.prefix(modality)[0] > 0 and getattr(self.model, "cls_token", None) is not None

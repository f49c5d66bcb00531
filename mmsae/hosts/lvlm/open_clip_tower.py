"""A timm trunk as the vision tower of a transformers LLaVA, so that a tiny image encoder can be one.

Registered with transformers' Auto classes when this module is imported, which ``load_host("lvlm:...")`` does:
folders with such a tower load without ``trust_remote_code``.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class TimmTowerConfig(PretrainedConfig):
    """Which trunk, and which of its maps."""

    model_type = "mmsae_timm_tower"

    architecture: str = "test_resnet"  #: timm name.
    image_size: int = 32  #: Pixels a side.
    patch_size: int = 8  #: Pixels a side of a token: the finest map's stride.
    #: Indices of the trunk's maps (``forward_intermediates``), the finest first; coarser ones are enlarged.
    levels: list[int] | tuple[int, ...] = (2, 3, 4)
    hidden_size: int = 336  #: Channels of these maps together.


class TimmTower(PreTrainedModel):
    """Tokens ``(B, rows * cols, hidden_size)``: the trunk's maps side by side, each on the finest one's grid.

    ``mean (hidden_size,)`` is subtracted from the maps, which are then multiplied with ``scale (hidden_size,)``.
    """

    config_class = TimmTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: TimmTowerConfig):
        super().__init__(config)
        self.trunk = timm.create_model(config.architecture, pretrained=False, num_classes=0)
        self.register_buffer("mean", torch.zeros(config.hidden_size))
        self.register_buffer("scale", torch.ones(config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: timm initialises its own trunk."""

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutputWithPooling:
        """The output of any vision tower of transformers, with one hidden state, for ``(B, 3, H, W)``."""
        levels = list(self.config.levels)
        maps = self.trunk.forward_intermediates(
            pixel_values, indices=levels, intermediates_only=True, output_fmt="NCHW"
        )
        size = maps[0].shape[-2:]
        grown = [m if m.shape[-2:] == size else F.interpolate(m, size=size, mode="nearest") for m in maps]
        x = (torch.cat(grown, 1).flatten(2).transpose(1, 2) - self.mean) * self.scale
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean(1), hidden_states=(x,))


AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig, exist_ok=True)
AutoModel.register(TimmTowerConfig, TimmTower, exist_ok=True)

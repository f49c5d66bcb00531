"""open_clip hosts: any architecture, with the tensors that CLIP multiplies by bare Parameters as virtual endpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from mmsae.hosts.encoders.encoder import Encoder
from mmsae.hosts.hooks import EncodeShadow, ModulePort, Port, ProjectionShadow, Shadow, ShadowPort
from mmsae.hosts.tokenizer import HostTokenizer
from mmsae.hosts.tokens import Marks, last_word, text_marks
from mmsae.types import IMAGE, TEXT, InputError

# Where the config says how it was loaded or where files lie, which is not what the host is.
_NOT_IDENTITY = {"custom_text", "hf_tokenizer_name", "timm_model_pretrained", "hf_model_pretrained"}


class AttentionPoolShadow(Shadow):
    """Stands in for ``AttentionPool2d.forward``, which takes its output projection apart; sees what is projected."""

    def __call__(self, x: Tensor) -> Tensor:
        pool: AttentionPool2d = self.original.__self__
        n = len(x)
        t = x.flatten(2).movedim(2, 1)
        t = torch.cat([t.mean(1, keepdim=True), t], 1) + pool.positional_embedding.to(x.dtype)  # (N, HW+1, C)
        q, k, v = (
            f(u).reshape(n, -1, pool.num_heads, f.out_features // pool.num_heads).transpose(1, 2)
            for f, u in ((pool.q_proj, t[:, :1]), (pool.k_proj, t), (pool.v_proj, t))
        )
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1)  # (N, C)
        new = self.run(pooled)
        return self.original(x) if new is pooled else pool.c_proj(new)


class OpenCLIPHost(Encoder):
    """A frozen open_clip model.

    Args:
        model: CLIP, CustomTextCLIP or CoCa, as ``open_clip.create_model`` makes it.
        config: The model's ``model_cfg``.
        tokenizer: The model's tokenizer, or a function that gets it when it is first needed.
        hint: How to load it again.
        device: Device that it runs on.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``.
    """

    modalities = (IMAGE, TEXT)

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        tokenizer: Callable[[], Callable[..., Tensor]],
        hint: str = "",
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ):
        super().__init__(model, hint, device, precision)
        self._config, self._get_tokenizer = config, tokenizer

    def config(self) -> dict[str, Any]:
        """Model and preprocessing configuration; values that equal open_clip's defaults are left out."""
        out = {k: v for k, v in self._config.items() if v and k not in _NOT_IDENTITY}
        for part, cls in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
            default = {f.name: f.default for f in fields(cls)}
            out[part] = {k: v for k, v in out[part].items() if k not in _NOT_IDENTITY and v != default.get(k)}
        pp = self._preprocess()
        shown = {"mean": list(pp.mean), "std": list(pp.std), "interpolation": pp.interpolation, "mode": pp.resize_mode}
        return {**out, "preprocess": {**shown, "size": list(pp.input_size[1:])}}

    def transform(self, train: bool = False) -> Callable:
        return image_transform_v2(self._preprocess(), is_train=train)

    def _preprocess(self) -> PreprocessCfg:
        """open_clip's preprocessing configuration, whose size json has as a list and it takes as a tuple."""
        given = self.model.visual.preprocess_cfg
        size = given["size"]
        return PreprocessCfg(**{**given, "size": tuple(size) if isinstance(size, list) else size})

    @cached_property
    def tokenize(self) -> HostTokenizer:
        try:
            tokenizer = self._get_tokenizer()
        except (OSError, ValueError, RuntimeError) as e:
            raise InputError(f"the tokenizer of host {self.hint} cannot be loaded: {str(e).splitlines()[0]}") from e
        return HostTokenizer(tokenizer, self.context_length)

    def too_long(self, texts: list[str]) -> list[bool]:
        """Which texts the tokenizer truncates."""
        return self.tokenize.too_long(texts)

    @property
    def context_length(self) -> int:
        return self._config["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)

    @property
    def logit_scale(self) -> float:
        return self.model.logit_scale.exp().item()

    @property
    def logit_bias(self) -> float | None:
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.item()

    @property
    def _text(self) -> nn.Module:
        """The text tower; in plain CLIP its parts lie in the model itself."""
        return getattr(self.model, "text", self.model)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        encode = self.model.encode_image if modality == IMAGE else self.model.encode_text
        return encode(x, normalize=False)

    def tower(self, module: str) -> str:
        return IMAGE if module.split(".")[0] == "visual" else TEXT

    def channels_last(self) -> bool:
        return getattr(getattr(self.model.visual, "trunk", None), "output_fmt", "") == "NHWC"

    def ids_entry(self) -> nn.Module:
        return self.model.token_embedding if isinstance(self.model, CLIP) else self._text

    def probe_input(self, modality: str, n: int) -> Tensor:
        if modality == TEXT:
            return torch.ones(n, self.context_length, dtype=torch.long)
        return torch.zeros(n, 3, *self._preprocess().input_size[1:])

    # Endpoints.

    def endpoint(self, name: str) -> Port:
        visual, text = self.model.visual, self._text
        if name == "image.embed":
            return ModulePort(visual)
        if name == "text.embed":
            return ModulePort(text) if text is not self.model else ShadowPort(text, "encode_text", EncodeShadow)
        if name == "image.pooled":
            if isinstance(visual, ModifiedResNet):
                return ShadowPort(visual.attnpool, "forward", AttentionPoolShadow)
            port = _timm_pooled(visual) if isinstance(visual, TimmModel) else _projected(visual, "proj")
        else:
            port = _projected(text, "proj" if isinstance(text, HFTextEncoder) else "text_projection")
        return port or self.endpoint(name.replace("pooled", "embed"))

    # Tokens.

    def has_cls(self, modality: str) -> bool:
        return super().has_cls(modality) if modality == IMAGE else self._text_cls() is not None

    def _text_cls(self) -> int | None:
        """Position of the text tower's class token: CoCa appends one, BERT-like towers pool their first token."""
        if getattr(self._text, "cls_emb", None) is not None:
            return self.context_length
        return 0 if "Cls" in type(getattr(self._text, "pooler", None)).__name__ else None

    def prefix(self, modality: str) -> tuple[int, int | None]:
        visual = self.model.visual
        if isinstance(visual, TimmModel):
            embed = getattr(visual.trunk, "patch_embed", None)
            return getattr(visual.trunk, "num_prefix_tokens", 0), getattr(embed, "num_patches", None)
        grid = getattr(visual, "grid_size", None)
        return (1, grid[0] * grid[1]) if grid else (0, None)

    def marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        if modality == IMAGE:
            return super().marks(modality, tokens, ids, is_map)
        extra = int(self._text_cls() == self.context_length)
        if ids is None or tokens.shape[1] - ids.shape[1] != extra:
            length = "no" if ids is None else ids.shape[1]
            raise InputError(f"a text site of host {self.hint} has {tokens.shape[1]} tokens for {length} token ids.")
        return self._text_marks(ids.to(tokens.device), extra)

    def _text_marks(self, ids: Tensor, extra: int) -> Marks:
        """Marks of ``ids (B, L)``; the token that ends the text is found by the rule that the host pools with."""
        text, at, pool = self._text, range(ids.shape[1]), self._text_pool()
        if pool == "eos":
            end = (ids == (text.text_eos_id if text is self.model else text.eos_id)).int().argmax(1)
        elif pool == "argmax":
            end = ids.argmax(1)
        else:  # the tower pools a fixed place or a mean: the text ends before the trailing padding
            pad = self.tokenize.pad_id()
            end = last_word(ids, getattr(text, "pad_id", 0) if pad is None else pad, self.tokenize.eos_id())
        if extra:  # the class token comes behind the text
            content, special = text_marks(ids, end, None, self.tokenize.special_ids())[:2]
            content, special = (F.pad(t, (0, 1), value=True) for t in (content, special))
            return Marks(content, special, self._text_cls(), torch.full_like(end, len(at)))
        eos = torch.full_like(end, {"last": len(at) - 1, "first": 0}[pool]) if pool in ("last", "first") else end
        return text_marks(ids, end, eos, self.tokenize.special_ids())._replace(cls=self._text_cls())

    def _text_pool(self) -> str:
        """open_clip's name of the rule by which the text tower pools; empty for towers of transformers."""
        return getattr(self.model, "text_pool_type", None) or getattr(self._text, "pool_type", "")


def _projected(owner: nn.Module, name: str) -> Port | None:
    """What the host multiplies by ``owner.name``, a Parameter or a module; None where there is no projection."""
    projection = getattr(owner, name, None)
    if isinstance(projection, nn.Module):
        return ModulePort(projection, "in")
    return None if projection is None else ShadowPort(owner, name, ProjectionShadow)


def _timm_pooled(visual: TimmModel) -> Port | None:
    """What the adapter's head projects; None where the trunk's own pooling is the embedding."""
    if hasattr(visual.head, "pool"):
        raise InputError("a timm tower that pools and projects in one attention layer has no endpoint image.pooled.")
    if len(visual.head):
        return ModulePort(visual.head, "in")
    classifier = visual.trunk.get_classifier()
    return ModulePort(classifier, "in") if isinstance(classifier, nn.Linear) else None

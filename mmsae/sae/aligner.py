"""The auxiliary aligner of VL-SAE for generative hosts: four affine maps that bring image and text states together.

States of a language model's image and text positions lie far apart; a contrastive loss aligns them first, and the SAE
is trained on the aligned states (arXiv 2510.21323; spec of VL-SAE, section 4.4). Contrastive hosts need none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmsae.files import atomic_folder, refuse_foreign
from mmsae.types import IMAGE, TEXT, InputError, Tokens

CFG, WEIGHTS = "aligner.json", "aligner.safetensors"
FORMAT = 1
_PUBLISHED = {"vision_projection": ("project", IMAGE), "text_projection": ("project", TEXT)} | {
    "vision_decoder": ("restore", IMAGE),
    "text_decoder": ("restore", TEXT),
}


def info_nce(image: Tensor, text: Tensor, tau: float = 0.07, normalize: bool = True) -> Tensor:
    """Mean of both directions' cross-entropy that row i of one ``(B, P)`` belongs to row i of the other.

    Always in float32 (half overflows). Cosines are compared (the paper) or plain products (its released code), over the
    temperature ``tau``.
    """
    with torch.autocast(image.device.type, enabled=False):
        a, b = image.float(), text.float()
        if normalize:
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        logits = a @ b.t() / tau
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


class Aligner(nn.Module):
    """``e = P(x)`` and back, ``x ~ Q(e)``, one pair of affine maps per modality.

    Args:
        d_in: Width of the states: one number, or one per modality.
        width: Width of the common space; default: that of the image states.
        tau: Temperature of the contrastive loss.
        normalize: Whether that loss compares cosines; False reproduces the published checkpoints.
    """

    def __init__(
        self,
        d_in: int | Mapping[str, int] | None = None,
        width: int | None = None,
        tau: float = 0.07,
        normalize: bool = True,
    ):
        super().__init__()
        self.width, self.tau, self.normalize = width, tau, normalize
        self.d_in: dict[str, int] = {}
        if d_in is not None:
            self.build(d_in)

    def build(self, d_in: int | Mapping[str, int]) -> Aligner:
        """Allocate the maps (draws from torch's global generator); returns self."""
        self.d_in = {IMAGE: d_in, TEXT: d_in} if isinstance(d_in, int) else dict(d_in)
        if set(self.d_in) != {IMAGE, TEXT}:
            raise InputError(f"an aligner needs image and text states, not {sorted(self.d_in)}")
        self.width = self.width or self.d_in[IMAGE]
        self.project = nn.ModuleDict({m: nn.Linear(d, self.width) for m, d in self.d_in.items()})
        self.restore = nn.ModuleDict({m: nn.Linear(self.width, d) for m, d in self.d_in.items()})
        return self

    def align(self, x: Tensor, modality: str) -> Tensor:
        """``(N, P)`` aligned states of ``x (N, d)``."""
        return self.project[modality](x)

    def unalign(self, e: Tensor, modality: str) -> Tensor:
        """``(N, d)`` states of a modality from aligned ones ``e (N, P)``."""
        return self.restore[modality](e)

    def tokens(self, tokens: Tokens) -> Tokens:
        """The same tokens with aligned states, for an SAE to train on."""
        return tokens._replace(x={m: self.align(x, m) for m, x in tokens.x.items()})

    def losses(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``contrastive``, ``image`` and ``text`` (mean squared errors of the way back), of paired states (B, d)."""
        if len(x[IMAGE]) != len(x[TEXT]):
            raise InputError(f"{len(x[IMAGE])} image and {len(x[TEXT])} text states are not pairs")
        e = {m: self.align(x[m], m) for m in (IMAGE, TEXT)}
        back = {m: F.mse_loss(self.unalign(e[m], m).float(), x[m].float()) for m in e}
        return {"contrastive": info_nce(e[IMAGE], e[TEXT], self.tau, self.normalize), **back}

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return sum(self.losses(x).values())

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``aligner.json`` and ``aligner.safetensors`` (tensor names as published)."""
        tensors = {}
        for name, (part, m) in _PUBLISHED.items():
            for key, value in getattr(self, part)[m].state_dict().items():
                tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
        fields = {"format": FORMAT, "d_in": self.d_in, "width": self.width}
        refuse_foreign(folder, CFG)
        with atomic_folder(folder) as temp:
            save_file(tensors, temp / WEIGHTS)
            (temp / CFG).write_text(
                json.dumps(fields | {"tau": self.tau, "normalize": self.normalize}, indent=2) + "\n"
            )
        return Path(folder)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu") -> Aligner:
        """Load a folder that :meth:`save_pretrained` wrote, or a published ``llava_aux_best.pt``.

        Raises:
            InputError: Neither, or tensors that are missing or do not fit.
        """
        path = Path(path)
        if path.is_file():
            return _published(path).to(device).eval()
        try:
            cfg, state = json.loads((path / CFG).read_text()), load_file(path / WEIGHTS)
        except (OSError, ValueError) as e:
            raise InputError(f"no aligner at {path}: expected a folder with {CFG}, or a published .pt file") from e
        if cfg["format"] > FORMAT:
            raise InputError(f"{path / CFG} has format {cfg['format']}; this version reads up to {FORMAT}")
        return from_state(state, str(path), cfg["tau"], cfg["normalize"]).to(device).eval()


@torch.no_grad()
def from_state(state: Mapping[str, Tensor], where: str, tau: float = 0.07, normalize: bool = False) -> Aligner:
    """Build the aligner of a published state dict; its training did not normalise.

    Raises:
        InputError: Other tensors than the eight published ones, or shapes that do not go together.
    """
    wanted = {f"{n}.{k}" for n in _PUBLISHED for k in ("weight", "bias")}
    if set(state) != wanted:
        raise InputError(f"{where} is no aligner: it lacks or adds {sorted(set(state) ^ wanted)[:4]}")
    width, d_image = state["vision_projection.weight"].shape
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: loading draws nothing
        made = Aligner({IMAGE: d_image, TEXT: state["text_projection.weight"].shape[1]}, width, tau, normalize)
    for name, (part, m) in _PUBLISHED.items():
        for key, own in getattr(made, part)[m].named_parameters():
            value = state[f"{name}.{key}"]
            if value.shape != own.shape:
                raise InputError(f"{name}.{key} in {where} has shape {tuple(value.shape)}, not {tuple(own.shape)}")
            own.copy_(value)
    return made


def _published(path: Path) -> Aligner:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for broken or unsafe files; each means the same to the user
        raise InputError(f"{path} cannot be read as a file of tensors ({type(e).__name__})") from e
    return from_state(state.get("model_state_dict", state), str(path))

"""What an image of the world shows, said by scorers that have nothing to do with the model that made or steers it.

Two kinds: arithmetic on pixels (colour and background), and a small classifier of all attributes of a lone object that
learned from renders of its own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmsae.files import atomic_file
from mmsae.types import InputError
from mmsae.world.generator.render import GROUND, PALETTE, SIZE, render
from mmsae.world.generator.scene import CONCEPT_GROUPS, sample_scenes
from mmsae.world.measure.host import attribute_labels
from mmsae.world.models import loop
from mmsae.world.models.options import Training

NONE = -1  # no colour is seen
ATTRIBUTES = ("shape", "colour", "size", "texture", "background", "position")
_PIXELS = 24  # fewer than the smallest shape has
_GREY = 30.0  # length of the mean chroma (grey levels) below which there is no colour; that of the palette is over 90


def to_uint8(images: Tensor) -> np.ndarray:
    """``(n, H, W, 3) uint8`` of images ``(n, 3, H, W)`` in [0, 1], the scorers' format."""
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def pixel_background(images: np.ndarray) -> np.ndarray:
    """``(n,)`` index into BACKGROUNDS of ``(n, H, W, 3) uint8``: nearest grey to the median of the frame, 2 wide."""
    frame = np.ones(images.shape[1:3], bool)
    frame[2:-2, 2:-2] = False
    grey = np.median(images[:, frame].astype(np.float32), axis=1).mean(1)
    return np.abs(grey[:, None] - GROUND.mean(1)).argmin(1)


def pixel_colour(images: np.ndarray) -> np.ndarray:
    """``(n,)`` index into COLOURS of a lone object in images ``(n, H, W, 3) uint8``, or :data:`NONE`.

    The grounds are grey, so the pixels that are most unlike the ground are the most saturated ones. Their mean chroma
    (colour minus its grey) is compared with those of the palette by angle, which dark stripes and soft edges leave as
    it is.
    """
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    chroma = pixels - pixels.mean(2, keepdims=True)
    top = np.argpartition(-(chroma**2).sum(2), _PIXELS, axis=1)[:, :_PIXELS, None]
    mean = np.take_along_axis(chroma, top, 1).mean(1)
    palette = PALETTE - PALETTE.mean(1, keepdims=True)
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    return np.where(np.linalg.norm(mean, axis=1) < _GREY, NONE, (mean @ palette.T).argmax(1))


class WorldProbe(nn.Module):
    """A small convolutional classifier of every attribute of a lone object on a 32 x 32 image."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.width = width
        w = width
        self.trunk = nn.Sequential(
            nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * w * (SIZE // 8) ** 2, 4 * w), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({a: nn.Linear(4 * w, len(CONCEPT_GROUPS[a])) for a in ATTRIBUTES})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``{attribute: (B, values) logits}`` of images ``(B, 3, 32, 32)`` in [-1, 1]."""
        h = self.trunk(x)
        return {a: head(h) for a, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """``{attribute: (n,) value ids}`` of images ``(n, 32, 32, 3) uint8``."""
        device = next(self.parameters()).device
        parts = [self(_centred(images[i : i + 500]).to(device)) for i in range(0, len(images), 500)]
        return {a: torch.cat([p[a] for p in parts]).argmax(1).cpu().numpy() for a in ATTRIBUTES}

    def save(self, file: str | Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        with atomic_file(file) as temp:
            save_file(self.state_dict(), temp, metadata={"world_probe": json.dumps({"width": self.width})})

    @classmethod
    def load(cls, file: str | Path) -> WorldProbe:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: No such file, or another sort of file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as f:
                config = json.loads((f.metadata() or {}).get("world_probe", "null"))
                if config is None:
                    raise InputError(f"{file} holds no probe of the generated world")
                out = cls(**config)
                out.load_state_dict({k: f.get_tensor(k) for k in f.keys()})
        except (OSError, SafetensorError) as e:
            raise InputError(f"{file} cannot be read as a probe: {e}") from e
        return out.eval()


def _centred(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def train_probe(
    n: int = 12000, steps: int = 250, seed: int = 1000, batch_size: int = 128, progress: bool = False
) -> WorldProbe:
    """A :class:`WorldProbe` trained on renders of its own: of ``n`` scenes, those of one object (three fifths).

    Generated images are softer than renders, so half of a batch is blurred and all of it is noisy: else softness
    would be read as one of the shapes.
    """
    scenes = sample_scenes(n, seed, siblings=False)
    scenes = scenes.rows(~scenes.two)
    images = render(scenes, seed)
    labels = attribute_labels(scenes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        probe = WorldProbe().train()
    matrices = [p for p in probe.parameters() if p.ndim >= 2]
    vectors = [p for p in probe.parameters() if p.ndim < 2]
    r = Training(steps, batch_size, seed, lr=0.02, adam_lr=3e-3)
    opts = [loop.Muon(matrices, lr=r.lr, weight_decay=r.weight_decay), torch.optim.Adam(vectors, lr=r.adam_lr)]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 40, step])
        rows = rng.integers(0, len(images), size=batch_size)
        x = _centred(images[rows])
        half = batch_size // 2
        x[:half] = nn.functional.avg_pool2d(nn.functional.pad(x[:half], (1, 1, 1, 1), mode="replicate"), 3, 1)
        x += 0.05 * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        logits = probe(x)
        return sum(nn.functional.cross_entropy(logits[a], labels[a][rows]) for a in ATTRIBUTES)

    loop.train(probe, opts, loss_of, r, "probe", max_norm=math.inf, progress=progress)
    return probe

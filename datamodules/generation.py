"""Activations of a text-to-image host while it draws, as a LightningDataModule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from datamodules.host_activations import HostActivations
from datamodules.options import Loading, Mixing
from datamodules.sites import SitesDataModule
from mmsae.activations import CaptureLoader, StreamingLoader
from mmsae.activations.generated import Generating, PromptLoader, PromptPass, read_prompts, split_prompts
from mmsae.options import Drawing, flat
from mmsae.types import IMAGE, InputError


@dataclass(frozen=True)
class ReadDrawing(Drawing):
    """How images are drawn, and what of them is read."""

    sample_steps: int | None = None
    """How many steps of a generation are read, drawn anew every time; None: all."""
    positions: int | None = None
    """How many positions of an image are read at a step; None: all."""
    branch: Literal["cond", "uncond", "all"] = "cond"
    """Guidance branch that is read: ``cond``, ``uncond`` or ``all``."""
    height: int | None = None
    """Height of the images in pixels; None: the pipeline's."""
    width: int | None = None
    """Width of the images in pixels; None: the pipeline's."""


@dataclass(frozen=True)
class PromptChoice:
    """Which prompts are drawn."""

    val_fraction: float = 0.1
    """Share of the prompts that training never sees; 0: no validation."""
    val_prompts: int = 32
    """Largest number of them that are drawn in a validation."""
    max_prompts: int = 100_000
    """Reading of prompts stops there."""
    caption_field: str = ""
    """Field of the samples' json that holds the caption."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise InputError(f"val_fraction is {self.val_fraction:g}, it must be at least 0 and below 1")


@dataclass(frozen=True)
class RowMixing(Mixing):
    """How rows of activations are mixed, in a buffer on the device."""

    buffer_rows: int = 16384
    """Capacity of the mixing buffer per modality, on the device."""
    read_batch: int = 8
    """Prompts per generation."""
    epoch_batches: int = 1000
    """Batches per epoch and rank."""

    @property
    def capacity(self) -> int:
        return self.buffer_rows


@flat
class GenerationDataModule(HostActivations):
    """Prompts through a diffusion pipeline and a mixing buffer: some steps and positions of every image.

    The pipeline runs in the training process on the trainer's device, outside the LightningModule. A resumed run is a
    statistical restart. Validation prompts are told apart by a hash of their text; no training batch holds them.

    Args:
        prompts: A ``.txt`` file with one prompt a line, or shards whose captions are the prompts.
        host: Name of the host, ``diffusers:ID-or-FOLDER``.
        sites: ``{modality: site}``: ``{image: "unet.up_blocks.0.attentions.1:update"}``; a text site may stand beside.
        d_in: Width; by default told from the configuration of text layers, else by loading the host.
        precision: Precision of the host's weights: ``fp32``, ``bf16`` or ``fp16``.
        seed: Seed of orders, noise and draws.
    """

    def __init__(
        self,
        prompts: str,
        host: str,
        sites: dict[str, str],
        d_in: int | None = None,
        precision: str = "fp32",
        seed: int = 0,
        drawing: ReadDrawing = ReadDrawing(),
        mixing: RowMixing = RowMixing(),
        chosen: PromptChoice = PromptChoice(),
        loading: Loading = Loading(),
    ) -> None:
        if not host.startswith("diffusers:"):
            raise InputError(f"host {host!r} draws nothing: give diffusers:ID-or-FOLDER")
        super().__init__(host, sites, d_in, precision, loading, mixing, seed)
        self.prompts, self.drawing, self.chosen = prompts, drawing, chosen
        self.split: tuple[list[str], list[str]] = ([], [])

    def _widths(self) -> dict[str, int]:
        if IMAGE not in self.chosen_sites:
            return super()._widths()
        self.setup()
        return {m: s.width for m, s in self.sites.items()}

    def at(self, name: str) -> SitesDataModule:
        if any(IMAGE in sites for sites in self.choices.values()):
            self.setup()  # once, and not for every choice, see above
        return super().at(name)

    def setup(self, stage: str | None = None) -> None:
        """Read the prompts and load the host onto the trainer's device, once.

        Raises:
            InputError: The host or the prompts cannot be had, or its width is not the one that was given.
        """
        if self.loaded_host is None:
            prompts = read_prompts(self.prompts, self.chosen.max_prompts, self.chosen.caption_field)
            self.split = split_prompts(prompts, self.chosen.val_fraction)
        super().setup(stage)

    def train_dataloader(self) -> StreamingLoader:
        ranks = self.ranks()
        prompts = PromptLoader(self.split[0], self.mixing.read_batch, self.seed, *ranks)
        return self.mixed(self._generating(), prompts, self.mixing.epoch_batches)

    def val_dataloader(self) -> CaptureLoader | list:
        """Every validation prompt once, with noise that is always the same; nothing where ``val_fraction`` is 0."""
        rank, world = self.ranks()
        prompts = self.split[1][: self.chosen.val_prompts][rank::world]
        if not prompts:
            return []
        batches = PromptPass(prompts, self.mixing.read_batch, self.seed + 1)
        return CaptureLoader(self._generating(), batches, self.chosen_sites, choices=self.choices)

    def _generating(self) -> Generating:
        return Generating(self.loaded_host, asdict(self.drawing))

    test_dataloader = predict_dataloader = val_dataloader

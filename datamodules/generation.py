"""Activations of a text-to-image host while it draws, as a LightningDataModule."""

from __future__ import annotations

from typing import Any, Literal

import lightning

from mmsae.activations import StreamingLoader
from mmsae.activations.generated import GeneratedLoader, Generating, PromptLoader, read_prompts, split_prompts
from mmsae.hosts import Host, load_host, site_width, with_options
from mmsae.types import IMAGE, InputError, Site


class GenerationDataModule(lightning.LightningDataModule):
    """Prompts through a diffusion pipeline and a mixing buffer: some steps and positions of every picture.

    The pipeline runs in the training process on the trainer's device, outside the LightningModule. A resumed run is a
    statistical restart. Validation prompts are told apart by a hash of their text; no training batch holds them.

    Args:
        prompts: A ``.txt`` file with one prompt a line, or shards whose captions are the prompts.
        host: Name of the host, ``diffusers:ID-or-FOLDER``.
        sites: ``{modality: site}``: ``{image: "unet.up_blocks.0.attentions.1:update"}``; a text site may stand beside.
        d_in: Width; by default told from the configuration of text layers, else by loading the host.
        steps: Of the scheduler.
        guidance: Guidance scale of the generations; up to 1 there is no unconditional branch.
        negative: Negative prompt; None: the pipeline's own.
        sample_steps: How many steps of a generation are read, drawn anew every time; None: all.
        positions: How many positions of a picture are read at a step; None: all.
        branch: ``cond``, ``uncond`` or ``all``.
        height: Of the pictures, in pixels; None: the pipeline's.
        width: As height.
        batch_size: Rows per batch and rank (per modality, where there are two).
        quotas: ``{modality: rows per batch}``.
        buffer_rows: Capacity of the mixing buffer per modality, on the device.
        read_batch: Prompts per generation.
        epoch_batches: Batches per epoch and rank.
        val_fraction: Share of the prompts that training never sees; 0: no validation.
        val_prompts: At most so many of them are drawn in a validation.
        max_prompts: Reading of prompts stops there.
        precision: ``fp32``, ``bf16`` or ``fp16``: of the host's weights.
        seed: Of orders, noise and draws.
        caption_field: Field of json that holds the caption.
        allow_random: Accept a host whose files lack weights, with random ones in their place.
        host_options: Options that the host is loaded with, which become part of its name (docs/how-to/hosts.md).
    """

    def __init__(
        self,
        prompts: str,
        host: str,
        sites: dict[str, str],
        d_in: int | None = None,
        steps: int = 20,
        guidance: float = 3.0,
        negative: str | None = None,
        sample_steps: int | None = None,
        positions: int | None = None,
        branch: Literal["cond", "uncond", "all"] = "cond",
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 512,
        quotas: dict[str, int] | None = None,
        buffer_rows: int = 16384,
        read_batch: int = 8,
        epoch_batches: int = 1000,
        val_fraction: float = 0.1,
        val_prompts: int = 32,
        max_prompts: int = 100_000,
        precision: str = "fp32",
        seed: int = 0,
        caption_field: str = "",
        allow_random: bool = False,
        host_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction is {val_fraction:g}, it must be at least 0 and below 1")
        if buffer_rows < batch_size:
            raise InputError(f"buffer_rows is {buffer_rows}, less than batch_size, which is {batch_size}")
        if not host.startswith("diffusers:"):
            raise InputError(f"host {host!r} draws nothing: give diffusers:ID-or-FOLDER")
        self.prompts, self.chosen_sites, self._d_in = prompts, sites, d_in
        self.host, self.allow_random = with_options(host, host_options or {}), allow_random
        self.options: dict[str, Any] = {
            "steps": steps, "guidance": guidance, "negative": negative, "sample_steps": sample_steps,
            "positions": positions, "branch": branch, "height": height, "width": width,
        }  # fmt: skip
        self.batch_size, self.quotas, self.buffer_rows, self.read_batch = batch_size, quotas, buffer_rows, read_batch
        self.epoch_batches, self.val_fraction, self.val_prompts = epoch_batches, val_fraction, val_prompts
        self.max_prompts, self.precision, self.seed, self.caption_field = max_prompts, precision, seed, caption_field
        self.loaded_host: Host | None = None
        self.split: tuple[list[str], list[str]] = ([], [])

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width: one number, or one per modality where they differ."""
        if self._d_in is None:
            if IMAGE in self.chosen_sites:
                self.setup()
                widths = {m: s.width for m, s in self.sites.items()}
            else:
                widths = {m: site_width(self.host, s) for m, s in self.chosen_sites.items()}
            self._d_in = next(iter(widths.values())) if len(set(widths.values())) == 1 else widths
        return self._d_in

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch holds."""
        return tuple(self.chosen_sites)

    @property
    def sites(self) -> dict[str, Site]:
        """Where the activations are read; empty before ``setup``, because a site's identity is in the weights."""
        return {m: self.loaded_host.site(s) for m, s in self.chosen_sites.items()} if self.loaded_host else {}

    def setup(self, stage: str | None = None) -> None:
        """Load the host onto the trainer's device and read the prompts, once.

        Raises:
            InputError: The host or the prompts cannot be had, or its width is not the one that was given.
        """
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        if self.loaded_host is None:
            prompts = read_prompts(self.prompts, self.max_prompts, self.caption_field)
            self.split = split_prompts(prompts, self.val_fraction)
            self.loaded_host = load_host(
                self.host, device=device, precision=self.precision, allow_random=self.allow_random
            )
        self.loaded_host.to(device)
        for m, site in self.sites.items():
            if m != site.modality:
                raise InputError(f"sites: {site.module} is given as {m}, but it is a site of modality {site.modality}")
            want = site.width if self._d_in is None else self._d_in
            want = want[m] if isinstance(want, dict) else want
            if site.width != want:
                raise InputError(f"d_in is {want}, but {m} activations of host {self.host} have width {site.width}")

    def train_dataloader(self) -> StreamingLoader:
        """Mixed batches without end, cut into epochs."""
        rank, world = self._ranks()
        return StreamingLoader(
            Generating(self.loaded_host, self.options),
            PromptLoader(self.split[0], self.read_batch, self.seed, rank, world),
            self.epoch_batches,
            self.batch_size,
            self.buffer_rows,
            sites=self.chosen_sites,
            quotas=self.quotas,
            seed=self.seed * 2**20 + rank,
        )

    def val_dataloader(self) -> GeneratedLoader | list:
        """Every validation prompt once, with noise that is always the same; nothing where ``val_fraction`` is 0."""
        rank, world = self._ranks()
        prompts = self.split[1][: self.val_prompts][rank::world]
        if not prompts:
            return []
        host = Generating(self.loaded_host, self.options)
        return GeneratedLoader(host, prompts, self.read_batch, self.chosen_sites, self.seed + 1)

    def _ranks(self) -> tuple[int, int]:
        self.setup()
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    test_dataloader = predict_dataloader = val_dataloader

"""What datamodules share that compute activations of a host while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datamodules.options import Loading, Mixing, ranks_of
from datamodules.sites import SitesDataModule
from mmsae.activations import StreamingLoader
from mmsae.hosts import Host, embed_width, host_modalities, site_width
from mmsae.types import InputError, Site


class HostActivations(SitesDataModule):
    """Activations of a frozen host, mixed over a buffer.

    The host runs in the training process on the trainer's device, outside the LightningModule: it is in no checkpoint
    and not wrapped by DDP. A resumed run is a statistical restart: the same distribution in another order.

    Args:
        host: Name of the host.
        sites: ``{modality: site}``; None: the host's embeddings.
        d_in: Width; None: read from the host's configuration, without weights.
        precision: Arithmetic of the host.
        loading: How it is loaded.
        mixing: Buffer and batches.
        seed: Seed of all orders.
    """

    def __init__(
        self,
        host: str,
        sites: dict[str, str] | None,
        d_in: int | None,
        precision: str,
        loading: Loading,
        mixing: Mixing,
        seed: int,
    ) -> None:
        super().__init__(sites)
        self.host, self._d_in = loading.name(host), d_in
        self.precision, self.loading, self.mixing, self.seed = precision, loading, mixing, seed
        self.loaded_host: Host | None = None
        self._told: dict[str, int] = {}  # widths of sites, by the configuration of the host

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width: one number, or one per modality where they differ."""
        if self._d_in is not None:
            return self._d_in
        widths = self._widths()
        return next(iter(widths.values())) if len(set(widths.values())) == 1 else widths

    def _widths(self) -> dict[str, int]:
        if self.chosen_sites is None:
            return dict.fromkeys(self.modalities, self._width("", embed_width, self.host))
        return {m: self._width(s, site_width, self.host, s) for m, s in self.chosen_sites.items()}

    def _width(self, key: str, tell: Callable[..., int], *about: str) -> int:
        if key not in self._told:
            self._told[key] = tell(*about)
        return self._told[key]

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch holds."""
        return tuple(self.chosen_sites or host_modalities(self.host))

    @property
    def sites(self) -> dict[str, Site]:
        """Where the activations are read; empty before ``setup``, because a site's identity is in the weights."""
        if self.loaded_host is None:
            return {}
        wanted = self.chosen_sites or self.loaded_host.default_sites()
        return {m: self.loaded_host.site(s) for m, s in wanted.items()}

    def setup(self, stage: str | None = None) -> None:
        """Load the host onto the trainer's device, once.

        Raises:
            InputError: The host cannot be had, or its width is not the one that was given.
        """
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        if self.loaded_host is not None:
            self.loaded_host.to(device)
            return
        self.loaded_host = self.loading.load(self.host, device=device, precision=self.precision)
        for own in map(self.at, self.choices) if self.choices else (self,):
            own._check_sites()

    def _check_sites(self) -> None:
        for m, site in self.sites.items():
            if m != site.modality:
                raise InputError(f"sites: {site.module} is given as {m}, but it is a site of modality {site.modality}")
            want = self.d_in if self._d_in is not None or self._told else site.width
            want = want[m] if isinstance(want, dict) else want
            if site.width != want:
                raise InputError(f"d_in is {want}, but {m} activations of host {self.host} have width {site.width}")

    def ranks(self) -> tuple[int, int]:
        """This rank and the number of ranks, once the host is loaded."""
        self.setup()
        return ranks_of(self.trainer)

    def size(self) -> tuple[int, dict[str, int] | None]:
        """Rows of a training batch on this rank: ``batch_size`` and quotas, for which see :class:`SharedBatches`."""
        (_, world), size, quotas = self.ranks(), self.mixing.batch_size, self.mixing.quotas
        asked = {"batch_size": size, "quotas": quotas}
        if found := self.shares(world, asked):
            size, quotas = found["units"], quotas and {m: found[m] for m in quotas}
        self.begin(world, asked, {m: n * world for m, n in {"units": size, **(quotas or {})}.items()})
        return size, quotas

    def mixed(self, host: Any, batches: Any, n_batches: int, gradient: str = "") -> StreamingLoader:
        """Mixed batches without end, cut into epochs."""
        (rank, _), (size, quotas) = self.ranks(), self.size()
        return StreamingLoader(
            host,
            batches,
            n_batches,
            size,
            self.mixing.capacity,
            sites=self.chosen_sites,
            choices=self.choices,
            quotas=quotas,
            half=self.mixing.refill_at_half,
            gradient=gradient,
            seed=self.seed * 2**20 + rank,
        )

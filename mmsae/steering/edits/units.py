"""What a strength of 1 means: statistics of every feature over a reference corpus.

The mean when active and the mean over all rows differ by the firing rate, a factor of 100 is common; both are kept,
and both are named (sdxl-unbox, arXiv 2410.22366, counts in the former).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsae.activations import ActivationStore
from mmsae.files import atomic_folder
from mmsae.sae import SAE
from mmsae.sae.fingerprint import is_of, sae_fingerprint
from mmsae.types import Codes, InputError, Tokens

UNITS = ("raw", "x_mean_active", "x_mean_all", "x_max", "x_pXX", "rel_norm", "kl")
PERCENTILES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
_OCTAVES, _PER_OCTAVE = 14, 8  # bins of positive codes from 2^-14 to 2^14, each 9 % wide
_BINS = 2 * _OCTAVES * _PER_OCTAVE
FORMAT = 1


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Statistics of one modality's codes; all tensors are ``(d_sae,)`` on the CPU.

    Attributes:
        n: Rows that were seen.
        fired: Rows on which each feature fired (code not 0).
        mean_active: Mean absolute code over those rows; 0 where it never fired.
        mean_all: Mean over all rows.
        max: Largest absolute code.
        percentiles: ``(len(PERCENTILES), d_sae)`` percentiles of the absolute codes that are not 0, from bins 9 % wide.
        modality: Modality of the codes.
        sae: Fingerprint of the SAE; empty where it is not known.
        path: Folder that they were read from or written to, so that a recipe can name it.
    """

    n: int
    fired: Tensor
    mean_active: Tensor
    mean_all: Tensor
    max: Tensor
    percentiles: Tensor
    modality: str = ""
    sae: str = ""
    path: str | None = None

    @property
    def rate(self) -> Tensor:
        """Share of rows on which each feature fired."""
        return self.fired.double().div(max(1, self.n)).float()

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.fired)

    def live(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Ids of features that fired, with a firing rate within ``[low, high]``."""
        return ((self.fired > 0) & (self.rate >= low) & (self.rate <= high)).nonzero()[:, 0]

    def unit(self, name: str, ids: Tensor | Sequence[int]) -> Tensor:
        """``(L,)`` raw codes that one unit of strength stands for: ``raw``, ``x_max``, ``x_p99.9``, ...

        Raises:
            InputError: Another unit, a percentile that was not kept, or a feature that never fired.
        """
        ids = torch.as_tensor(ids, dtype=torch.long)
        if name == "raw":
            return torch.ones(len(ids))
        table = {"x_mean_active": self.mean_active, "x_mean_all": self.mean_all, "x_max": self.max}
        if match := re.fullmatch(r"x_p(\d+(?:\.\d+)?)", name):
            if float(match[1]) not in PERCENTILES:
                raise InputError(f"unit {name}: the statistics keep the percentiles {', '.join(map(str, PERCENTILES))}")
            table[name] = self.percentiles[PERCENTILES.index(float(match[1]))]
        if name not in table:
            raise InputError(f"unit {name!r} is not one of {', '.join(UNITS)}")
        if len(silent := ids[self.fired[ids] == 0]):
            rows = f"the {self.n} rows of the statistics"
            raise InputError(f"unit {name}: feature {int(silent[0])} never fired on {rows}")
        return table[name][ids]

    def check(self, sae: SAE, modality: str) -> None:
        """Refuse statistics of another SAE or modality."""
        if self.d_sae != sae.d_sae:
            raise InputError(f"the statistics are of {self.d_sae} features, the SAE has {sae.d_sae}")
        if self.sae and not is_of(sae, self.sae):
            raise InputError(f"the statistics are of SAE {self.sae[:12]}, not of this one, {sae_fingerprint(sae)[:12]}")
        if self.modality and self.modality != modality:
            raise InputError(f"the statistics are of {self.modality} codes, the site's codes are {modality}")

    # Gathering.

    @classmethod
    def of_codes(cls, batches: Iterable[Codes], modality: str = "", sae: str = "") -> FeatureStats:
        """Gather them from batches of codes; memory is bounded by ``d_sae`` and one batch."""
        total: _Counts | None = None
        for codes in batches:
            total = total or _Counts(codes.d_sae)
            total.add(codes)
        if total is None:
            raise InputError("statistics of features need at least one batch of codes")
        return total.done(modality, sae)

    @classmethod
    def collect(
        cls,
        sae: SAE,
        batches: Iterable[Tokens],
        modality: str | None = None,
        tokens: str = "content",
        rows: int | None = None,
    ) -> FeatureStats:
        """Gather them from a stream of activations, of a host or of :meth:`from_store`, until ``rows`` were seen.

        ``tokens="content"`` leaves special tokens out, as the default gate of text sites does; ``all`` keeps them.
        """
        m = sae._modality(modality)

        @torch.no_grad()
        def codes() -> Iterable[Codes]:
            left = rows
            for batch in batches:
                x = batch.x[m]
                if tokens == "content" and batch.special is not None and m in batch.special:
                    x = x[~batch.special[m]]
                yield sae.encode(x[:left], m)
                if left is not None and (left := left - len(x)) <= 0:
                    return

        return cls.of_codes(codes(), m, sae_fingerprint(sae))

    @classmethod
    def from_store(
        cls,
        sae: SAE,
        store: ActivationStore | str | Path,
        modality: str | None = None,
        tokens: str = "content",
        rows: int | None = None,
        batch_size: int = 8192,
    ) -> FeatureStats:
        """Gather them from an activation store; the arguments are those of :meth:`collect`."""
        store = store if isinstance(store, ActivationStore) else ActivationStore(store)
        m = sae._modality(modality)
        name = store.spec.own(m, sae.sites)

        def batches() -> Iterable[Tokens]:
            for at in range(0, store.spec.rows[name], batch_size):
                idx = torch.arange(at, min(at + batch_size, store.spec.rows[name])).numpy()
                yield store.tokens({m: name}, {m: idx}, uids=False)

        return cls.collect(sae, batches(), m, tokens, rows)

    # Files.

    def save(self, folder: str | Path) -> FeatureStats:
        """Write ``stats.safetensors`` and ``stats.json``; returns the statistics with their path."""
        names = ("fired", "mean_active", "mean_all", "max", "percentiles")
        with atomic_folder(folder) as temp:
            save_file({n: getattr(self, n).contiguous() for n in names}, temp / "stats.safetensors")
            about = {"format": FORMAT, "n": self.n, "modality": self.modality, "sae": self.sae}
            (temp / "stats.json").write_text(json.dumps(about | {"percentiles": PERCENTILES}, indent=2) + "\n")
        return FeatureStats(**{**self.__dict__, "path": str(folder)})

    @classmethod
    def load(cls, folder: str | Path) -> FeatureStats:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: No such folder, or files that are damaged or of another format.
        """
        try:
            about = json.loads((Path(folder) / "stats.json").read_text())
            tensors = load_file(Path(folder) / "stats.safetensors")
            if about["format"] != FORMAT or tuple(about["percentiles"]) != PERCENTILES:
                raise InputError(f"{folder}/stats.json has format {about['format']}, this version reads {FORMAT}")
            return cls(about["n"], **tensors, modality=about["modality"], sae=about["sae"], path=str(folder))
        except FileNotFoundError as e:
            raise InputError(f"no statistics of features in {folder}: {Path(e.filename or '').name} is missing") from e
        except InputError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"the statistics in {folder} are damaged: {e}") from e


class _Counts:
    """Running sums, maxima and bins."""

    def __init__(self, d_sae: int):
        self.n = 0
        self.fired = torch.zeros(d_sae, dtype=torch.long)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.signed = torch.zeros(d_sae, dtype=torch.float64)
        self.max = torch.zeros(d_sae)
        self.bins = torch.zeros(d_sae * _BINS, dtype=torch.int32)

    def add(self, codes: Codes) -> None:
        """Count one batch."""
        values = codes.values.detach().float().cpu()
        ids = codes.ids().cpu()
        self.n += codes.n
        on = values != 0
        v, i = values[on], ids[on]
        self.signed.index_add_(0, i, v.double())
        v = v.abs()
        self.fired.index_add_(0, i, torch.ones_like(i))
        self.total.index_add_(0, i, v.double())
        self.max.scatter_reduce_(0, i, v, "amax")
        bin_ = ((v.log2() + _OCTAVES) * _PER_OCTAVE).floor().long().clamp_(0, _BINS - 1)
        self.bins.index_add_(0, i * _BINS + bin_, torch.ones_like(i, dtype=torch.int32))

    def done(self, modality: str, sae: str) -> FeatureStats:
        """The statistics."""
        cumulative = self.bins.view(-1, _BINS).cumsum(1)
        # (P, F) positives below the percentile
        wanted = torch.tensor(PERCENTILES, dtype=torch.float64)[:, None] / 100 * self.fired
        at = torch.searchsorted(cumulative.double(), wanted.t().contiguous()).clamp_(max=_BINS - 1)  # (F, P)
        upto = cumulative.gather(1, at)
        inside = self.bins.view(-1, _BINS).gather(1, at).clamp(min=1)
        share = 1 - (upto - wanted.t()) / inside  # within the bin, on a log scale
        value = 2.0 ** ((at + share) / _PER_OCTAVE - _OCTAVES)
        value = torch.where(self.fired[:, None] > 0, value.minimum(self.max[:, None]), 0.0)
        return FeatureStats(
            self.n,
            self.fired,
            (self.total / self.fired.clamp(min=1)).float(),
            (self.signed / max(1, self.n)).float(),
            self.max,
            value.t().float().contiguous(),
            modality,
            sae,
        )

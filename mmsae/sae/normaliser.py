"""Input normalisation: per-row unit norm, per-modality centring and scale, and their composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmsae.sae.part import Part
from mmsae.types import InputError, RowInfo

_EPS = 1e-12


def all_reduce(*tensors: Tensor, op: str = "sum") -> None:
    """Sum tensors (or take the ``max``) over ranks in place; nothing without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for t in tensors:
            torch.distributed.all_reduce(t, getattr(torch.distributed.ReduceOp, op.upper()))


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over ranks, with the gradient of this rank's own.

    A function of it then has, after DDP's mean of gradients, the gradient that one process with all rows would have.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.detach().clone()
    all_reduce(total)
    return value + (total / torch.distributed.get_world_size() - value.detach())


class Normaliser(Part):
    """``x -> row norm -> minus the modality's mean -> times a scale -> row norm``, every step optional.

    Statistics are fitted once on a sample (:meth:`fit`) and are buffers afterwards. :meth:`invert` undoes all of it, so
    reconstructions come back in the units of x. The order outer norm, mean, inner norm is the one that closes the
    modality gap of contrastive hosts (spec: centring per modality, then renormalised).

    Args:
        unit_in: Divide every row by its L2 norm first.
        centre: Subtract the mean of the row's modality.
        scale: ``none``, or ``rms``: one factor per modality that makes the mean squared norm of a row 1.
        unit_out: Divide every row by its L2 norm at the end.
        standardise: Instead of ``unit_in``: subtract the mean of the row's own entries, then divide by their standard
            deviation plus 1e-5. It is undone with the standard deviation alone: both as in SAELens, whose models
            (``layer_norm``) need it.
    """

    name = "normaliser"

    def __init__(
        self,
        unit_in: bool = False,
        centre: bool = False,
        scale: str = "none",
        unit_out: bool = False,
        standardise: bool = False,
    ):
        super().__init__()
        if scale not in ("none", "rms"):
            raise InputError(f"normaliser scale must be 'none' or 'rms', not {scale!r}")
        if unit_in and standardise:
            raise InputError("unit_in and standardise are both true: rows are divided by one of the two, or by neither")
        self.unit_in, self.centre, self.scale, self.unit_out = unit_in, centre, scale, unit_out
        self.standardise = standardise
        self.modalities: tuple[str, ...] = ()

    def config(self) -> dict:
        given = {"unit_in": self.unit_in, "centre": self.centre, "scale": self.scale, "unit_out": self.unit_out}
        return given | ({"standardise": True} if self.standardise else {})

    def build(self, d_in: Mapping[str, int]) -> None:
        """Allocate the statistics for ``{modality: width}``."""
        self.modalities = tuple(d_in)
        for m, d in d_in.items():
            self.register_buffer(f"mean_{m}", torch.zeros(d))
            self.register_buffer(f"factor_{m}", torch.ones(()))
            # total variance of the normalised rows: the unit of the FVU loss, constant so that ranks and batches agree
            self.register_buffer(f"variance_{m}", torch.full((), float("nan")))

    @property
    def per_row(self) -> bool:
        """Whether rows are scaled one by one, so that decoding needs ``Codes.info``."""
        return self.unit_in or self.unit_out or self.standardise

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` has run (or its result was loaded)."""
        return all(bool(torch.isfinite(self.variance(m))) for m in self.modalities)

    def variance(self, modality: str) -> Tensor:
        """Scalar: total variance of the normalised rows of a modality (NaN before :meth:`fit`)."""
        return getattr(self, f"variance_{modality}")

    def mean(self, modality: str) -> Tensor:
        """``(d,)`` mean that is subtracted; without centring, the mean of the normalised rows (zeros before fit)."""
        return getattr(self, f"mean_{modality}")

    def forward(self, x: Tensor, modality: str) -> tuple[Tensor, RowInfo | None]:
        """Normalise ``x (N, d)``; returns it with what :meth:`invert` needs."""
        inner = None
        x, outer, mean = self._first(x)
        if self.centre:
            x = x - self.mean(modality)
        if self.scale != "none":
            x = x * getattr(self, f"factor_{modality}")
        if self.unit_out:
            inner = x.norm(dim=1, keepdim=True).clamp(min=_EPS)
            x = x / inner
        return x, RowInfo(outer, inner, mean) if self.per_row else None

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows after the step that looks at nothing but the row, and what it divided by and subtracted."""
        if self.standardise:
            mean = x.mean(dim=1, keepdim=True)
            x = x - mean
            deviation = x.std(dim=1, keepdim=True)
            return x / (deviation + 1e-5), deviation, mean
        if self.unit_in:
            norm = x.norm(dim=1, keepdim=True).clamp(min=_EPS)
            return x / norm, norm, None
        return x, None, None

    def invert(self, x: Tensor, modality: str, info: RowInfo | None) -> Tensor:
        """Bring normalised rows back to the units of x.

        Raises:
            InputError: A per-row normaliser without ``info``: the norms are not in the code and cannot be guessed.
        """
        if self.per_row and info is None:
            raise InputError(
                "this SAE normalises every row: decode() needs the codes' info (keep the Codes that encode() returned)"
            )
        if self.unit_out:
            x = x * info.inner
        if self.scale != "none":
            x = x / getattr(self, f"factor_{modality}")
        if self.centre:
            x = x + self.mean(modality)
        if self.unit_in or self.standardise:
            x = x * info.outer
        return x + info.mean if self.standardise else x

    def gradient(self, grad: Tensor, modality: str, info: RowInfo | None) -> Tensor:
        """``(N, d)`` gradient at the normalised rows, from that at the raw rows; norms of rows count as constants."""
        if self.unit_in or self.standardise:
            grad = grad * info.outer
        if self.scale != "none":
            grad = grad / getattr(self, f"factor_{modality}")
        return grad * info.inner if self.unit_out else grad

    @torch.no_grad()
    def fit(self, sample: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        """Fit means, factors and variances in float64 on ``{modality: (N, d) rows or a list of such}``.

        Under a process group every rank gives its own rows and all get the statistics of all rows.

        Raises:
            InputError: A modality without rows, or whose rows do not vary.
        """
        for m in self.modalities:
            rows = sample.get(m, ())
            parts = [rows] if isinstance(rows, Tensor) else list(rows)
            mean = self.mean(m)
            getattr(self, f"factor_{m}").fill_(1.0)
            mean.zero_()
            if self.centre or self.scale != "none":
                total, square, n = self._moments(parts, m, mean, stop="centre")
                if self.centre:
                    mean.copy_(total / n)
                    square = square / n - (total / n).square().sum()
                else:
                    square = square / n
                if self.scale != "none":
                    getattr(self, f"factor_{m}").copy_(square.clamp(min=_EPS).rsqrt())
            total, square, n = self._moments(parts, m, mean, stop="end")
            variance = square / n - (total / n).square().sum()
            if not torch.isfinite(variance):
                raise InputError(f"some of the {int(n):,} {m} rows to fit on are not finite (NaN or infinite)")
            if not variance > 1e-12:
                raise InputError(
                    f"the {m} activations do not vary (total variance {float(variance):.3g} over {int(n)} rows)"
                )
            self.variance(m).copy_(variance)
            if not self.centre:
                mean.copy_(total / n)  # nothing subtracts it: decoders start there

    def _moments(self, parts: list[Tensor], modality: str, like: Tensor, stop: str) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 sum of rows, sum of squared norms and count, of the rows before centring or at the end."""
        total = torch.zeros_like(like, dtype=torch.float64)
        square, n = total.new_zeros(()), total.new_zeros(())
        for part in parts:
            x = part.to(like)
            if stop == "end":
                x, _ = self(x, modality)
            else:
                x = self._first(x)[0]
            x = x.double()
            total += x.sum(0)
            square += x.square().sum()
            n += len(x)
        all_reduce(total, square, n)
        if not n > 0:
            raise InputError(f"no {modality} activations to fit the normaliser on")
        return total, square, n

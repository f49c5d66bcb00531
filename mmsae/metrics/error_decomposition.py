"""What a linear map of activations knows of an SAE's error, and what it does not ("dark matter", arXiv 2410.14670).

``x = x_hat + linear + nonlinear``: the error ``e = x - x_hat`` is regressed on x by least squares, with an intercept,
on rows other than those that it is measured on. The nonlinear part is the plateau that wider SAEs do not get below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.metrics.components import CHUNK
from mmsae.metrics.regression import Affine, Regression, Spread, r2
from mmsae.types import Codes, InputError, Tokens

Stream = Tensor | Iterable[Tensor | Tokens]


class ErrorParts(NamedTuple):
    """Rows as three parts that sum to them, float64; to put in the place of an activation, for example."""

    x_hat: Tensor  #: ``(N, d)`` the SAE's reconstruction
    linear: Tensor  #: ``(N, d)`` what x predicts of the error
    nonlinear: Tensor  #: ``(N, d)`` the rest


class ErrorReport(NamedTuple):
    """Figures of :class:`ErrorDecomposition`, on the rows that nothing was fitted on."""

    fvu: float  #: Share of the variance of x that x_hat misses
    fvu_nonlinear: float  #: The same of ``x_hat + linear``; equals ``(1 - r2) Var(e) / Var(x)``
    r2: float  #: Share of the error's variance that x predicts, pooled over dimensions
    r2_dimensions: float  #: Mean of the dimensions' own R^2, which is not the pooled one
    r2_fit: float  #: Pooled, on the rows of the fit; far above ``r2``: too few rows
    identity: float  #: Share of the error's variance that a multiple of x predicts: shrinkage, which is all linear
    scale: float  #: Best scale of x_hat about its mean, by the rows of the fit; above 1: codes are too small
    fvu_rescaled: float  #: FVU of x_hat at that scale, about the means
    r2_rescaled: float  #: Share of the error's variance at that scale that x predicts; NaN where no error is left
    norm_r2: float  #: R^2 of ``|e|^2`` by an affine function of x
    norm_by_norm: float  #: R^2 of ``|e|^2`` by ``|x|^2`` alone
    norm_by_l0: float  #: R^2 of ``|e|^2`` by the number of active latents alone
    n_fit: int  #: Rows of the fit
    n: int  #: Rows of the figures

    @property
    def fvu_linear(self) -> float:
        """What the linear part takes from the FVU."""
        return self.fvu - self.fvu_nonlinear


class _Row(NamedTuple):
    x: Tensor
    x_hat: Tensor
    e: Tensor
    e2: Tensor  # (N, 1) squared norm of e
    x2: Tensor
    l0: Tensor


class ErrorDecomposition:
    """The error of a trained SAE as a linear function of its input and a rest; see the module.

    Rows come as ``(N, d)`` raw activations, or as a stream of such or of :class:`mmsae.Tokens`, whose special tokens
    (CLS, BOS) are left out: their norms would dominate. Of the rows only sums are kept, and a hash of each by which
    rows that were fitted on are recognised.

    Args:
        sae: A trained SAE, or what has its ``encode(x, modality)`` and ``decode(codes, modality)``.
        modality: Which rows; may be left out for SAEs of one modality.
    """

    def __init__(self, sae: Any, modality: str | None = None) -> None:
        self.sae, self.modality = sae, modality
        self._fitted: Affine | None = None
        self._keys = torch.zeros(0, dtype=torch.long)

    def fit(self, rows: Stream) -> ErrorDecomposition:
        """Fit the maps; returns self.

        Raises:
            InputError: Fewer than 20 rows for each dimension.
        """
        own, by_norm, by_l0, keys = Regression(), Regression(), Regression(), []
        for r in self._stream(rows):
            own.add(r.x, torch.cat([r.e, r.e2], 1))
            by_norm.add(r.x2, r.e2)
            by_l0.add(r.l0, r.e2)
            keys.append(_keys(r.x))
        self._fitted = own.fit()
        self._by_norm, self._by_l0, self._keys = by_norm.fit(), by_l0.fit(), torch.cat(keys)
        cov, both, variance = own.covariances()
        d = len(cov)
        xx, xe, ee = cov.diagonal().sum(), both[:, :d].diagonal().sum(), variance[:d].sum()
        self._identity = float(xe / xx) if xx > 0 else 0.0
        hat = xx - 2 * xe + ee  # of x_hat = x - e
        self._scale = float((xx - xe) / hat) if hat > 0 else 1.0
        explained = float((self._fitted.weight[:, :d] * both[:, :d]).sum() / ee) if ee > 0 else float("nan")
        self._r2_fit, self.n_fit = explained, own.a.n
        return self

    def parts(self, x: Tensor) -> ErrorParts:
        """Rows ``x (N, d)`` as reconstruction, linear and nonlinear part of the error."""
        r = self._read(x)
        linear = self._map(r)[:, :-1]
        return ErrorParts(r.x_hat, linear, r.e - linear)

    def evaluate(self, rows: Stream) -> ErrorReport:
        """The figures on other rows.

        Raises:
            InputError: Nothing was fitted, there are no rows, or more than half of them are rows of the fit.
        """
        x, e, rest, scaled, shrunk, e2, no2, no_norm, no_l0 = (Spread() for _ in range(9))
        known = 0
        for r in self._stream(rows):
            predicted = self._map(r)
            x.add(r.x)
            e.add(r.e)
            rest.add(r.e - predicted[:, :-1])
            scaled.add(r.x - self._scale * r.x_hat)
            shrunk.add(r.e - self._identity * r.x)
            e2.add(r.e2)
            no2.add(r.e2 - predicted[:, -1:])
            no_norm.add(r.e2 - self._by_norm(r.x2))
            no_l0.add(r.e2 - self._by_l0(r.l0))
            known += int(torch.isin(_keys(r.x), self._keys).sum())
        if not x.n:
            raise InputError("no rows to measure the error on")
        if known > x.n / 2:
            raise InputError(
                f"{known:,} of the {x.n:,} rows to measure on are among the {self.n_fit:,} that were fitted on: give "
                "others"
            )
        variance, error, nonlinear = (float(t) for t in (x.about_mean().sum(), e.square.sum(), rest.square.sum()))
        left = float(scaled.about_mean().sum())
        per_dimension = 1 - rest.square / e.about_mean()
        # at another scale c the error is (1 - c) x + c e: x predicts the first term, and of the second what it did
        rescaled = 1 - self._scale**2 * nonlinear / left if left > 1e-10 * variance else float("nan")
        return ErrorReport(
            fvu=error / variance,
            fvu_nonlinear=nonlinear / variance,
            r2=r2(rest, e),
            r2_dimensions=float(per_dimension[e.about_mean() > 0].mean()),
            r2_fit=self._r2_fit,
            identity=1 - float(shrunk.about_mean().sum() / e.about_mean().sum()),
            scale=self._scale,
            fvu_rescaled=left / variance,
            r2_rescaled=rescaled,
            norm_r2=r2(no2, e2),
            norm_by_norm=r2(no_norm, e2),
            norm_by_l0=r2(no_l0, e2),
            n_fit=self.n_fit,
            n=x.n,
        )

    def _map(self, r: _Row) -> Tensor:
        if self._fitted is None:
            raise InputError("nothing was fitted yet: give fit() rows first")
        return self._fitted(r.x)

    def _stream(self, rows: Stream) -> Iterator[_Row]:
        for part in [rows] if isinstance(rows, Tensor) else rows:
            if isinstance(part, Tokens):
                name = self.modality or next(iter(part.x))
                special = (part.special or {}).get(name)
                part = part.x[name] if special is None else part.x[name][~special]
            yield from (self._read(chunk) for chunk in part.split(CHUNK) if len(chunk))

    def _read(self, x: Tensor) -> _Row:
        codes, x_hat = _reconstructed(self.sae, x, self.modality)
        x = x.to(x_hat.device).double()
        e = x - x_hat
        return _Row(x, x_hat, e, *(t.square().sum(1, keepdim=True) for t in (e, x)), codes.l0()[:, None].to(x))


@torch.no_grad()
def _reconstructed(sae: Any, x: Tensor, modality: str | None) -> tuple[Codes, Tensor]:
    codes = sae.encode(x, modality)
    return codes, sae.decode(codes, modality).double()


def _keys(x: Tensor) -> Tensor:
    """``(N,)`` a 64-bit hash of each row, whatever its batch."""
    odd = torch.randint(2**62, (x.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (x.float().cpu().contiguous().view(torch.int32).long() * odd).sum(1)


def predictable_share(sae: Any, fit_rows: Stream, eval_rows: Stream, modality: str | None = None) -> float:
    """Pooled share of the variance of an SAE's error that a linear map of its input predicts on other rows.

    See :class:`ErrorDecomposition`; below 0 where the map is worse than the mean.

    Raises:
        InputError: Fewer than 20 rows of width d for each dimension, or the rows to evaluate are those of the fit.
    """
    return ErrorDecomposition(sae, modality).fit(fit_rows).evaluate(eval_rows).r2


class SiteShare(NamedTuple):
    """What reconstructions elsewhere in a host predict of an SAE's error, pooled R^2 on other rows."""

    error: float  #: Of the error
    nonlinear: float  #: Of its nonlinear part


def error_from_sites(
    own: ErrorDecomposition,
    site: str,
    others: Mapping[str, Any],
    fit: Iterable[Mapping[str, Tensor]],
    evaluate: Iterable[Mapping[str, Tensor]],
) -> dict[str, SiteShare]:
    """Regress an SAE's error on what SAEs of other sites reconstruct (the layer before, the same layer's MLP).

    Args:
        own: The decomposition of the SAE's error, fitted.
        site: Name of its site in the streams.
        others: ``{site: SAE}``, each of the modality of ``own``.
        fit: Batches ``{site: (N, d) raw activations}``, row i of every site of one token.
        evaluate: The same of other rows.

    Returns:
        ``{site: shares}`` of each site, and of ``all`` together where there are several.

    Raises:
        InputError: Fewer than 20 rows for each dimension of the sites together.
    """
    names = [*others, *(["all"] if len(others) > 1 else [])]

    def read(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        for batch in batches:
            p = own.parts(batch[site])
            recon = {name: _reconstructed(sae, batch[name], own.modality)[1] for name, sae in others.items()}
            recon["all"] = torch.cat([r.to(p.linear.device) for r in recon.values()], 1)
            yield recon, p.linear + p.nonlinear, p.nonlinear

    regressions = {name: Regression() for name in names}
    for recon, e, nonlinear in read(fit):
        for name, regression in regressions.items():
            regression.add(recon[name], torch.cat([e, nonlinear], 1))
    maps = {name: regression.fit() for name, regression in regressions.items()}
    targets = Spread(), Spread()
    rests = {name: (Spread(), Spread()) for name in names}
    for recon, e, nonlinear in read(evaluate):
        targets[0].add(e)
        targets[1].add(nonlinear)
        for name, affine in maps.items():
            predicted = affine(recon[name])
            rests[name][0].add(e - predicted[:, : e.shape[1]])
            rests[name][1].add(nonlinear - predicted[:, e.shape[1] :])
    return {
        name: SiteShare(*(r2(rest, target) for rest, target in zip(rests[name], targets, strict=True)))
        for name in names
    }

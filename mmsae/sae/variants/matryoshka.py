"""Matryoshka SAEs: parts of a code that are nested in each other reconstruct alone, too.

Nested in the width (arXiv 2503.17547): a prefix of the latents. Nested in the number of latents of a row, as MSAE for
CLIP (arXiv 2502.20578) and Multi-TopK (arXiv 2406.04093) have it: the largest entries of the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmsae.device import sent, waits
from mmsae.kernels import sparse_decode
from mmsae.sae.losses import LossContext, Reconstruction
from mmsae.sae.selector import SelectContext, TopK
from mmsae.types import Codes, InputError, SAEOutput


def prefix_parts(codes: Codes, atoms: Tensor, widths: Sequence[int]) -> Iterator[Tensor]:
    """What each group of latents adds to a reconstruction, ``(N, d)``; all groups cost about one decoding.

    Args:
        codes: Codes of N rows; sparse ones stay sparse.
        atoms: ``(d_sae, d)``.
        widths: Ends of the groups, increasing; the first group begins at latent 0.
    """
    starts = [0, *widths][: len(widths)]
    if codes.indices is None:
        for start, end in zip(starts, widths, strict=True):
            yield codes.values[:, start:end] @ atoms[start:end]
        return
    indices, order = codes.indices.sort(dim=1)
    values = codes.values.gather(1, order)
    bounds = sent(torch.tensor([0, *widths]), indices.device).expand(len(indices), -1).contiguous()
    first = torch.searchsorted(indices, bounds)
    if waits(indices):  # more columns than the fullest row has cost less than to ask for its number
        most_of_each = [min(end - start, indices.shape[1]) for start, end in zip(starts, widths, strict=True)]
    else:
        most_of_each = first.diff(dim=1).amax(0).tolist() if len(indices) else [0] * len(widths)
    for j, most in enumerate(most_of_each):
        columns = first[:, j, None] + torch.arange(max(most, 1), device=indices.device)
        mine = columns < first[:, j + 1, None]
        columns = columns.clamp(max=indices.shape[1] - 1)
        yield sparse_decode(values.gather(1, columns) * mine, indices.gather(1, columns), atoms)


class _Nested(Reconstruction):
    """Base: ``sum_j weight_j * error(level j)``; weights are ``1 / n`` each where none are given."""

    def __init__(self, weights: Sequence[float] | None, reduction: str) -> None:
        super().__init__(reduction)
        self.given = None if weights is None else list(weights)

    def weights(self, n: int) -> list[float]:
        """Of n levels."""
        if self.given is not None and len(self.given) != n:
            raise InputError(f"{self.name} has {n} levels and {len(self.given)} weights")
        return self.given or [1.0 / n] * n

    def levels(self, out: SAEOutput, modality: str, ctx: LossContext) -> list[Tensor]:
        """``(N, d)`` reconstructions, from the smallest part of the code to the largest."""
        raise NotImplementedError

    def of(self, out: SAEOutput, modality: str, ctx: LossContext) -> Tensor:
        levels = self.levels(out, modality, ctx)
        errors = (self.error(out.target, level, modality, ctx) for level in levels)
        return sum(w * e for w, e in zip(self.weights(len(levels)), errors, strict=True))


class NestedReconstruction(_Nested):
    """Reconstruction by prefixes of the latents, the whole code among them; in place of ``Reconstruction``.

    The selector chooses among all latents, so that a prefix has what is left of a row's code. The order of latents
    then means something: the first ones are the coarsest.

    Args:
        prefixes: Ends of the inner prefixes, as shares of the latents (all at most 1) or as numbers of latents. The
            whole width is always the last level, named or not.
        sampled: Instead of ``prefixes``: number of levels whose inner ends are drawn in every step, without
            repetition, with ``P(m) ~ m^-power - (m + 1)^-power`` (Pareto, as saev has it).
        power: Of that law.
        weights: Weight of each level, in place of the mean over levels.
        reduction: Unit of each level's error; see :class:`Reconstruction`.
    """

    name = "nested_reconstruction"

    def __init__(
        self,
        prefixes: Sequence[float] = (),
        sampled: int = 0,
        power: float = 0.5,
        weights: Sequence[float] | None = None,
        reduction: str = "fvu",
    ) -> None:
        super().__init__(weights, reduction)
        if bool(prefixes) and bool(sampled):
            raise InputError(f"give prefixes ({list(prefixes)}) or sampled ({sampled}), not both")
        if sampled < 0 or power <= 0:
            raise InputError(f"sampled must be at least 1 and power above 0, not {sampled} and {power:g}")
        if any(p <= 0 for p in prefixes) or list(prefixes) != sorted(set(prefixes)):
            raise InputError(f"prefixes must be above 0 and increase, not {list(prefixes)}")
        self.prefixes, self.sampled, self.power = list(prefixes), sampled, power

    def widths(self, ctx: LossContext) -> list[int]:
        """Numbers of latents of the levels in this step; the last is ``d_sae``."""
        d_sae = ctx.sae.d_sae
        if self.sampled:
            if self.sampled > d_sae:
                raise InputError(f"{self.sampled} prefixes do not fit d_sae = {d_sae}")
            if self.sampled == 1:
                return [d_sae]
            law = -torch.arange(1, d_sae + 1, dtype=torch.float64).pow(-self.power).diff()
            inner = law.multinomial(self.sampled - 1, generator=ctx.generator(16)) + 1
            return [*inner.sort().values.tolist(), d_sae]
        shares = all(p <= 1 for p in self.prefixes)
        ends = {max(1, round(p * d_sae)) if shares else int(p) for p in self.prefixes}
        if max(ends, default=0) > d_sae:
            raise InputError(f"a prefix of {max(ends)} latents does not fit d_sae = {d_sae}")
        return sorted(ends | {d_sae})

    def levels(self, out: SAEOutput, modality: str, ctx: LossContext) -> list[Tensor]:
        dictionary = ctx.sae.dictionary(modality)
        recon = torch.zeros_like(out.recon) if dictionary.bias is None else dictionary.bias
        levels = []
        for part in prefix_parts(out.codes, dictionary.rows(), self.widths(ctx)[:-1]):
            recon = recon + part
            levels.append(recon)
        return [*levels, out.recon]


class NestedTopK(_Nested):
    """Reconstruction by the largest entries of a row, for several numbers of them; the selector must be ``TopK``.

    MSAE (arXiv 2502.20578) has several numbers up to the selector's k, in place of ``Reconstruction`` ([R]: the paper's
    ladder goes on to all latents; so does this one with a selector whose k is ``d_sae``). Multi-TopK has 4 k with
    weight 1/8 beside ``Reconstruction``, so that a code stays good where more latents are used than in training.

    Args:
        multiples: Number of entries of each level, in multiples of the selector's k (rounded up, at most ``d_sae``).
        weights: Weight of each level, in place of the mean over levels.
        reduction: Unit of each level's error; see :class:`Reconstruction`.
    """

    name = "nested_topk"

    def __init__(
        self,
        multiples: Sequence[float] = (0.125, 0.25, 0.5, 1.0),
        weights: Sequence[float] | None = None,
        reduction: str = "fvu",
    ) -> None:
        super().__init__(weights, reduction)
        if not multiples or min(multiples) <= 0 or list(multiples) != sorted(set(multiples)):
            raise InputError(f"multiples must be above 0 and increase, not {list(multiples)}")
        self.multiples = list(multiples)

    def levels(self, out: SAEOutput, modality: str, ctx: LossContext) -> list[Tensor]:
        selector, dictionary = ctx.sae.selector, ctx.sae.dictionary(modality)
        if not isinstance(selector, TopK):
            raise InputError(f"nested_topk counts in multiples of the k of selector 'topk', not {selector.name!r}")
        ks = [min(math.ceil(multiple * selector.k), ctx.sae.d_sae) for multiple in self.multiples]
        values, indices = out.codes.values, out.codes.indices
        if ks[-1] > selector.k:
            wider = TopK(ks[-1], score=selector.score_name)
            values, indices = wider(out.pre, SelectContext(modality, dictionary, out.target))
        order = values.detach().abs().argsort(dim=1, descending=True)
        values, indices = values.gather(1, order), indices.gather(1, order)
        atoms, done, levels = dictionary.rows(), 0, []
        recon = torch.zeros_like(out.recon) if dictionary.bias is None else dictionary.bias
        for k in ks:
            if k > done:
                recon = recon + sparse_decode(values[:, done:k], indices[:, done:k], atoms)
            levels.append(out.recon if k == selector.k else recon)
            done = k
        return levels

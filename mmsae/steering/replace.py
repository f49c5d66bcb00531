"""Detect and replace: codes say where a concept is, and activations without it take its place (arXiv 2606.31699).

Pushing a code takes activations where the host never saw any; replacing the detected positions by activations that
lack the concept stays on its data. Two donors: the same noise drawn from a prompt without the concept, or the rest of
the same picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmsae.backbones.where import COND, Where
from mmsae.types import InputError


class Detector(NamedTuple):
    """Where a concept is.

    Attributes:
        ids: ``(L,)`` latents of the concept.
        tau: ``(L,)`` code above which each counts.
        dilate: Cells that the mask grows on every side of a detected one.
    """

    ids: Tensor
    tau: Tensor
    dilate: int = 1

    def mask(self, z: Tensor, item: Tensor, position: Tensor, grid: tuple[int, int], n: int) -> Tensor:
        """``M_p = max_i z_i(p) / tau_i > 1``, dilated.

        Args:
            z: ``(N, L)`` codes of the latents.
            item: ``(N,)`` which map.
            position: ``(N,)`` ``y * W + x``.
            grid: Height and width of the maps.
            n: Number of maps.

        Returns:
            ``(n, H * W)`` bool.
        """
        fired = (z > self.tau.to(z)).any(1)
        maps = torch.zeros(n, grid[0] * grid[1], device=z.device)
        maps[item, position] = fired.to(maps)
        if self.dilate:
            k = 2 * self.dilate + 1
            maps = F.max_pool2d(maps.view(n, 1, *grid), k, stride=1, padding=self.dilate).flatten(1)
        return maps > 0


class Touched(NamedTuple):
    """One call of a site under :func:`replacing`.

    Attributes:
        step: Of the generation.
        share: Share of the positions that were replaced.
        relative: Mean ``|dx| / |x|`` over replaced positions; NaN where there are none.
    """

    step: int | None
    share: float
    relative: float


@contextmanager
def recording(host: Any, site: Any) -> Iterator[dict[tuple[int | None, int, int], Tensor]]:
    """Keep the rows of a site while the host generates: ``{(step, branch, evaluation): (B, T, d)}``.

    A batch's maps of all steps are held: ``steps * B * T * d`` numbers on the host's device.
    """
    kept: dict[tuple[int | None, int, int], Tensor] = {}

    def record(rows: Tensor, where: Where) -> Tensor:
        for branch, own in _by_branch(where):
            evaluation = sum(k[:2] == (where.step, branch) for k in kept)
            kept[where.step, branch, evaluation] = _maps(rows[own], where.item[own], where.position[own])
        return rows

    with host.edit(site, record, where=True):
        yield kept


@contextmanager
def replacing(
    host: Any,
    site: Any,
    sae: Any,
    detector: Detector,
    donor: dict[tuple[int | None, int, int], Tensor] | None = None,
    *,
    modality: str | None = None,
    steps: range | Sequence[int] | None = None,
) -> Iterator[list[Touched]]:
    """While open, positions where the concept is detected get a donor's activation.

    The mask is found on the conditional half, where the concept is, and applied to both, so that guidance does not
    push away from what is still in the other one.

    Args:
        host: Diffusion host.
        site: Of maps.
        sae: Trained there.
        detector: Where the concept is.
        donor: What :func:`recording` kept of a run with the same seeds and steps and prompts without the concept. None:
            the mean of the sample's unmasked positions plus the position's own reconstruction error, which keeps what
            the SAE does not explain ([D]: the paper says residual noise).
        modality: Of the SAE.
        steps: Where to act; default: everywhere.

    Yields:
        A list that is filled with what each call touched.

    Raises:
        InputError: The site has no map, or the donor's run had other steps, pictures or sizes.
    """
    log: list[Touched] = []
    calls: dict[tuple[int | None, int], int] = {}

    def fn(rows: Tensor, where: Where) -> Tensor:
        if where.grid is None or where.position is None:
            raise InputError(f"detect-and-replace needs a site of maps, and {site} has no grid.")
        if steps is not None and where.step not in steps:
            return rows
        n = int(where.item.max()) + 1
        halves = list(_by_branch(where))
        seen = dict(halves).get(COND, halves[0][1])
        codes = sae.encode(rows[seen], modality)
        ids = detector.ids.to(rows.device)
        mask = detector.mask(codes.gather(ids), where.item[seen], where.position[seen], where.grid, n)
        hit = mask[where.item, where.position]
        evaluations = {b: calls.get((where.step, b), 0) for b, _ in halves}
        calls.update({(where.step, b): e + 1 for b, e in evaluations.items()})
        if not hit.any():
            log.append(Touched(where.step, 0.0, float("nan")))
            return rows
        new = torch.empty_like(rows)
        for branch, own in halves:
            item, position = where.item[own], where.position[own]
            if donor is None:
                new[own] = _rest(rows[own], item, hit[own], sae, modality, n)
            else:
                new[own] = _given(donor, (where.step, branch, evaluations[branch]), item, position, rows)
        relative = (new - rows)[hit].norm(dim=1) / rows[hit].norm(dim=1).clamp(min=1e-12)
        log.append(Touched(where.step, hit.double().mean().item(), relative.mean().item()))
        return torch.where(hit[:, None], new, rows)

    with host.edit(site, fn, where=True):
        yield log


def _by_branch(where: Where) -> Iterator[tuple[int, Tensor]]:
    """``(branch, rows of it)``; without guidance everything is conditional."""
    if where.branch is None:
        yield COND, torch.arange(len(where.item), device=where.item.device)
        return
    for branch in where.branch.unique().tolist():
        yield branch, (where.branch == branch).nonzero().flatten()


def _maps(rows: Tensor, item: Tensor, position: Tensor) -> Tensor:
    out = rows.new_zeros(int(item.max()) + 1, int(position.max()) + 1, rows.shape[1])
    out[item, position] = rows
    return out


def _rest(rows: Tensor, item: Tensor, hit: Tensor, sae: Any, modality: str | None, n: int) -> Tensor:
    """Mean of each sample's unmasked rows, plus each row's reconstruction error; the row itself where all is masked."""
    free = (~hit).to(rows)
    total = rows.new_zeros(n, rows.shape[1]).index_add_(0, item, rows * free[:, None])
    count = rows.new_zeros(n).index_add_(0, item, free)
    error = rows - sae.decode(sae.encode(rows, modality)).to(rows)
    filled = (total / count.clamp(min=1)[:, None])[item] + error
    return torch.where((count > 0)[item][:, None], filled, rows)


def _given(donor: dict, key: tuple[int | None, int, int], item: Tensor, position: Tensor, rows: Tensor) -> Tensor:
    if key not in donor:
        held = len({k[0] for k in donor})
        raise InputError(f"the donor's run has no step {key[0]} of this branch: it had {held} steps.")
    maps = donor[key]
    if int(item.max()) >= len(maps) or int(position.max()) >= maps.shape[1] or maps.shape[2] != rows.shape[1]:
        raise InputError(
            f"the donor has {len(maps)} maps of {maps.shape[1]} positions and width {maps.shape[2]}, but the run has "
            f"{int(item.max()) + 1} of {int(position.max()) + 1} and width {rows.shape[1]}."
        )
    return maps[item, position].to(rows)

"""An intervention bound to an SAE: the function that a host calls with the rows of a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.hosts.sites import COND, Where
from mmsae.sae import SAE
from mmsae.steering.edits import codes as algebra
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.log import SiteLog
from mmsae.types import Codes, InputError, SAEOutput

if TYPE_CHECKING:
    from mmsae.steering.edits.intervention import Intervention


def group(where: Where) -> Tensor:
    """``(N,)`` number of each row's sample: its item, once per guidance branch."""
    return where.item * 2 + (COND if where.branch is None else where.branch)


def dilate(mask: Tensor, where: Where, radius: int) -> Tensor:
    """``(N,) bool`` grown by ``radius`` cells in all directions, within each sample's own map.

    Raises:
        InputError: A radius at a site that is no map.
    """
    if not radius:
        return mask
    if where.grid is None or where.position is None:
        raise InputError(f"dilate = {radius} at a site that is no map")
    g, (h, w) = group(where), where.grid
    cells = torch.zeros(int(g.max()) + 1, h * w, device=mask.device)
    cells[g, where.position] = mask.to(cells)
    grown = F.max_pool2d(cells.view(-1, 1, h, w), 2 * radius + 1, 1, radius).flatten(1)
    return grown[g, where.position] > 0


def mean_donor(rows: Tensor, where: Where, mask: Tensor, residual: Tensor) -> Tensor:
    """``(N, d)``: the mean of a sample's other rows plus what the SAE does not explain of the row itself.

    Args:
        rows: ``(N, d)``.
        where: What they are.
        mask: ``(N,) bool`` rows that will be replaced; samples without other rows keep theirs.
        residual: ``(N, d)`` ``x - dec(z)``.
    """
    g = group(where)
    n = int(g.max()) + 1 if len(g) else 0
    free = (~mask).to(rows)
    count = rows.new_zeros(n).index_add_(0, g, free)
    mean = rows.new_zeros(n, rows.shape[1]).index_add_(0, g, rows * free[:, None]) / count.clamp(min=1)[:, None]
    return torch.where((count > 0)[g][:, None], mean[g] + residual, rows)


class Steer:
    """``fn(rows, where)`` of an intervention; made by :meth:`Intervention.bind`.

    Args:
        intervention: What to do.
        sae: Whose codes.
        modality: Of the site's rows; may be omitted for one-modality SAEs.
        dtype: Of the host's tensor, so that the log tells the change that remains after rounding.

    Attributes:
        gate: Where it acts.
        log: What it did.
        steps: Its window of steps, for hosts that apply it outside of the steps' clock (text encoders).

    Raises:
        InputError: A feature out of range, a unit without statistics, statistics of another SAE, or parts that do not
            go together.
    """

    def __init__(
        self, intervention: Intervention, sae: SAE, modality: str | None = None, dtype: torch.dtype = torch.float32
    ):
        iv = self.iv = intervention
        self.sae, self.modality, self.dtype = sae, sae._modality(modality), dtype
        self.gate, self.log, self.steps = iv.gate, SiteLog(), iv.gate.steps
        self.signed = bool(getattr(sae, "signed", False))
        iv.edit.check(sae.d_sae)
        algebra.check_policy(sae, iv.policy)
        if sae.training and sae.selector.couples_batch:
            raise InputError(
                "this SAE selects over the whole batch while it trains: sae.eval() makes rows independent, "
                "which guidance (both branches in one batch) needs"
            )
        if iv.stats is not None:
            iv.stats.check(sae, self.modality)
        weight = sae.dictionary(self.modality).weight
        self.edit, self.ids = iv.raw(), torch.tensor(iv.edit.ids, dtype=torch.long, device=weight.device)
        self.push: tuple[Tensor, float] | None = None
        self.basis: Tensor | None = None
        if iv.writeback == "direction" or iv.unit == "rel_norm":
            self.push = self._push(self.edit)
        if iv.writeback == "project_out":
            self.basis = orthonormal(algebra.atoms(sae, self.modality, self.ids))

    def check_steps(self, n: int) -> None:
        """Refuse a window of steps that a schedule of ``n`` steps does not have; see :meth:`Gate.check_steps`."""
        self.gate.check_steps(n)

    def __call__(self, rows: Tensor, where: Where) -> Tensor:
        """Edited rows ``(N, d)``; the very same object where nothing changes, else a new tensor.

        Rows that the gate excludes, or of which no code changes, are bit-identical.
        """
        with torch.autocast(rows.device.type, enabled=False):
            new = self._call(rows, where)
        if new is None:
            self.log.note(where, None, 0)
            return rows
        new, touched = new
        old = rows.detach()[touched].float()
        changed = new.detach()[touched].to(self.dtype).float() - old
        self.log.note(where, changed.norm(dim=1) / old.norm(dim=1).clamp(min=1e-12), touched.sum())
        return new

    def _call(self, rows: Tensor, where: Where) -> tuple[Tensor, Tensor] | None:
        """New rows and ``(N,) bool`` which of them changed; None where nothing does."""
        weight = self.gate.weight(where, self.modality).to(rows)
        live = weight[:, 0] != 0
        if not live.any():
            return None
        device = self.sae.dictionary(self.modality).weight.device
        if device != rows.device:
            raise InputError(f"the SAE is on {device}, the site's rows on {rows.device}: move it with sae.to(...)")
        if self.iv.writeback == "replace":
            return self._replace(rows, where, weight)
        whole = bool(live.all())
        x = rows if whole else rows[live]
        new, touched = self._write(x, where if whole else only(where, live), weight[live])
        if not touched.any():
            return None
        if whole:
            return new, touched
        return rows.masked_scatter(live[:, None], new), live.masked_scatter(live, touched)

    def _read(self, x: Tensor, where: Where, weight: Tensor) -> tuple[SAEOutput | None, Codes | None, Tensor]:
        """What the SAE says, as far as it is needed, and the weights after the gates that ask for it."""
        iv, out, codes = self.iv, None, None
        if self.gate.guard or iv.writeback == "splice" or iv.policy == "pre" or iv.donor == "mean":
            out = self.sae({self.modality: x})[self.modality]
            codes = out.codes
        elif (self.push is None and self.basis is None) or self.gate.active is not None:
            codes = self.sae.encode(x, self.modality)
        if self.gate.active is not None and iv.writeback != "replace":
            on = self.gate.acting(codes.gather(self.ids)) if len(self.ids) else codes.l0() > 0
            weight = weight * on[:, None]
        if self.gate.guard:
            fvu = sample_fvu(self.sae, self.modality, out, group(where))
            weight = weight * (fvu < self.gate.guard.q)[:, None]
        return out, codes, weight

    def _write(self, x: Tensor, where: Where, weight: Tensor) -> tuple[Tensor, Tensor]:
        """New rows for ``x (N, d)``, and which of them changed."""
        out, codes, weight = self._read(x, where, weight)
        acts = weight[:, 0] != 0
        if self.push is not None:
            direction, size = self.push
            change = direction * size
            if self.iv.unit == "rel_norm":
                change = change * x.norm(dim=1, keepdim=True)
            return self._added(x, weight * change, acts & bool(size))
        if self.basis is not None:
            along = ((x - algebra.origin(self.sae, self.modality, x)) @ self.basis.t()).clamp(min=0)
            along = self.iv.strength * along
            return self._added(x, -weight * (along @ self.basis), acts & (along != 0).any(1))
        change, touched = self._change(out, codes, where)
        if self.iv.writeback == "delta":
            return self._added(x, weight * change, acts & touched)
        target = out.x_hat.float() + change
        new = torch.where(weight == 1, target, x + weight * (target - x))
        return torch.where(acts[:, None], new, x), acts

    @staticmethod
    def _added(x: Tensor, dx: Tensor, touched: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(touched[:, None], x + dx, x), touched

    def _change(self, out: SAEOutput | None, codes: Codes, where: Where) -> tuple[Tensor, Tensor]:
        """``J(z' - z)``, ``(N, d)`` float32, and ``(N,) bool`` rows with any change of codes."""
        m, policy, k = self.modality, self.iv.policy, getattr(self.sae.selector, "k", None)
        sparse = None
        if self.edit.everything:
            (op,) = self.edit.ops
            sparse = codes._replace(values=codes.values * (op.args["g"] - 1))
        elif policy == "pre" and len(self.ids):
            sparse = algebra.difference(algebra.reselect(out.pre, codes, self.edit, k, where), codes)
        else:
            z = codes.gather(self.ids).float()
            dz = self.edit.apply(z, where, self.signed) - z
            if policy == "budget" and len(self.ids):
                sparse = algebra.within_budget(codes, dz, self.ids, k)
        if sparse is not None:
            return algebra.sparse_linear(self.sae, m, sparse), (sparse.values != 0).any(1)
        return algebra.linear(self.sae, m, dz, self.ids, codes.info), (dz != 0).any(1)

    def _push(self, edit: Edit) -> tuple[Tensor, float]:
        """``(d,)`` direction and size of a push by ``add`` alone: unit length with ``rel_norm``."""
        v: dict[int, Tensor] = {}
        for op in edit.ops:
            for i, x in zip(op.ids, torch.as_tensor(op.args["v"]).expand(len(op.ids)).tolist(), strict=True):
                v[i] = v.get(i, 0.0) + x
        atoms = algebra.atoms(self.sae, self.modality, self.ids)
        if self.iv.writeback == "direction":
            atoms = F.normalize(atoms, dim=1)
        values = torch.tensor([v[i] for i in edit.ids], device=atoms.device)
        if self.iv.unit != "rel_norm":
            return values @ atoms, 1.0 if values.any() else 0.0
        size = float(values.abs().max()) if len(values) else 0.0
        return F.normalize(values @ atoms, dim=0), size

    def _replace(self, rows: Tensor, where: Where, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows where the features fire, and their neighbours, moved to the donor's."""
        out, codes, weight = self._read(rows, where, weight)
        live = weight[:, 0] != 0
        mask = dilate(self.gate.acting(codes.gather(self.ids)) & live, where, self.iv.dilate) & live
        if self.iv.donor == "mean":
            donor = mean_donor(rows, where, mask, rows - out.x_hat.float())
        else:
            donor = self.iv.donor(rows, where, mask).to(rows)
        if not mask.any():
            return None
        weight = weight * self.iv.strength
        moved = torch.where(weight == 1, donor, rows + weight * (donor - rows))
        return torch.where(mask[:, None], moved, rows), mask


def only(where: Where, which: Tensor) -> Where:
    """The rows ``which (N,) bool`` of a :class:`Where`."""
    names = ("item", "position", "image", "special", "branch")
    return where._replace(**{n: None if (t := getattr(where, n)) is None else t[which] for n in names})


def orthonormal(atoms: Tensor) -> Tensor:
    """``(r, d)`` orthonormal directions of ``atoms (L, d)``, by Gram-Schmidt in their order, without dependent ones.

    Each has a positive product with its atom, so that its sign still means more or less of the feature.
    """
    q, r = torch.linalg.qr(F.normalize(atoms.double(), dim=1).t())
    diagonal = r.diagonal()
    return (q * diagonal.sign())[:, diagonal.abs() > 1e-6].t().to(atoms.dtype)


def sample_fvu(sae: SAE, modality: str, out: SAEOutput, sample: Tensor) -> Tensor:
    """``(N,)``: share of variance that the SAE leaves unexplained in the sample of each row.

    The unit is the total variance that the normaliser was fitted with, as in the FVU loss; where it was not fitted
    (imported SAEs), the rows' squared distance from the decoder's bias.
    """
    error = (out.target - out.recon).float().square().sum(1)
    variance = sae.normaliser.variance(modality).float()
    total = variance.expand_as(error)
    if not torch.isfinite(variance):
        bias = sae.dictionary(modality).bias
        total = (out.target if bias is None else out.target - bias).float().square().sum(1)
    n = int(sample.max()) + 1 if len(sample) else 0
    sums = [t.new_zeros(n).index_add_(0, sample, t) for t in (error, total)]
    return (sums[0] / sums[1].clamp(min=1e-12))[sample]

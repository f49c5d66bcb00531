"""One intervention: an edit of codes, what its strengths mean, where it acts, and how the host's tensor is written.

Write-backs (``x`` rows of the host, ``w`` weight of the gate, ``J`` the linear part of the decoder):
    delta: ``x + w J(z' - z)``; keeps what the SAE does not explain. The default.
    splice: ``dec(z')``; loses it. An edit that changes nothing still reconstructs: the baseline that shows how much of
        an effect comes from reconstructing (multimodal-sae, arXiv 2411.14982, and sae-for-vlm, 2504.02821, splice).
    direction: ``x + w a d_i/|d_i|`` without encoding, ``a`` the strength in its unit, or ``a = gamma |x|`` with
        ``rel_norm``; the edit is of ``add`` only (SSL, 2505.16146; SAVE, 2512.07730).
    project_out: ``x - w max(<x - b, u>, 0) u`` for the orthonormalised atoms ``u`` of the edit's features; the edit is
        of ``ablate`` only, ``b`` is the decoder's bias in the units of x.
    replace: where a feature exceeds ``active`` (or 0), the rows of a donor (2606.31699); the edit is of ``ablate``.

Policies of top-k SAEs: ``post`` edits what was selected, so one more feature may fire; ``pre`` edits the pre-codes and
selects again; ``budget`` edits and drops the smallest untouched feature. Per-row selection is what SAEs here have; one
that selects over the batch must be in eval mode (a learned threshold, or top-k per row), since guidance puts both
branches into one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.hosts.sites import Where
from mmsae.sae import SAE
from mmsae.steering.edits import codes as algebra
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.gate import Gate
from mmsae.steering.edits.log import SiteLog
from mmsae.steering.edits.rows import dilate, group, mean_donor, only
from mmsae.steering.edits.units import UNITS, FeatureStats
from mmsae.steering.methods.kl_strength import KLSearch, search_kl
from mmsae.types import Codes, InputError, SAEOutput

WRITEBACKS = ("delta", "splice", "direction", "project_out", "replace")
_GATE = tuple(f.name for f in fields(Gate))
_NEEDS_ONLY = {"direction": "add", "project_out": "ablate", "replace": "ablate"}


@dataclass(frozen=True, eq=False)
class Intervention:
    """What to do at a site; a value, without SAE or host.

    Attributes:
        edit: Edit of the codes.
        unit: Unit of its strengths: ``raw``, ``x_mean_active``, ``x_mean_all``, ``x_max``, ``x_pXX``; ``rel_norm`` (an
            edit of ``add`` alone moves every row by ``|dx| = gamma |x|``, gamma the largest ``|v|``, whatever its code
            is); ``kl`` (nats of next-token divergence, resolved by :meth:`at_kl`).
        stats: Needed by all units but ``raw``, ``rel_norm`` and ``kl``.
        writeback: See the module.
        policy: ``post``, ``pre`` or ``budget``.
        strength: Multiplies all strengths and factors of the edit (``v, lo, hi, g, b``), and how far ``project_out``
            and ``replace`` go; what :meth:`vary` sweeps.
        donor: Donor of ``replace``: ``"mean"`` (the sample's other rows), or ``donor(rows, where, mask) -> (N, d)``.
        dilate: Cells by which ``replace`` grows its mask.
        tokens, space, branch, steps, phase, active, guard: See :class:`~mmsae.steering.edits.gate.Gate`.

    Raises:
        InputError: Parts that do not go together.
    """

    edit: Edit
    unit: str = "x_mean_active"
    stats: FeatureStats | None = None
    writeback: str = "delta"
    policy: str = "post"
    strength: float = 1.0
    donor: str | Callable[[Tensor, Where, Tensor], Tensor] | None = None
    dilate: int = 0
    tokens: str | Sequence[int] | None = None
    space: Tensor | Sequence | None = None
    branch: str = "cond"
    steps: tuple[int, int] | range | None = None
    phase: str = "both"
    active: float | Sequence[float] | None = None
    guard: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gate", Gate(**{n: getattr(self, n) for n in _GATE}))
        for name in _GATE:  # as the gate understood them
            object.__setattr__(self, name, getattr(self.gate, name))
        if self.unit not in UNITS and not self.unit.startswith("x_p"):
            raise InputError(f"unit {self.unit!r} is not one of {', '.join(UNITS)}")
        if self.writeback not in WRITEBACKS:
            raise InputError(f"writeback {self.writeback!r} is not one of {', '.join(WRITEBACKS)}")
        kinds = {op.kind for op in self.edit.ops}
        only = _NEEDS_ONLY.get(self.writeback) or ("add" if self.unit == "rel_norm" and self.edit.strengths else None)
        if only and kinds - {only}:
            why = f"writeback {self.writeback!r}" if self.writeback in _NEEDS_ONLY else "unit 'rel_norm'"
            raise InputError(f"{why} takes an edit of {only} alone, not {', '.join(sorted(kinds - {only}))}")
        if self.unit == "rel_norm" and self.edit.strengths and self.writeback == "splice":
            raise InputError("unit 'rel_norm' pushes rows by their own length, which writeback 'splice' replaces")
        if self.branch == "sign" and self.writeback not in ("delta", "direction"):
            raise InputError(f"branch 'sign' is a change with a sign, which writeback {self.writeback!r} has not")
        if self.writeback == "replace" and self.donor != "mean" and not callable(self.donor):
            raise InputError(f"writeback 'replace' needs a donor: 'mean' or a function, not {self.donor!r}")
        if self.policy != "post" and (self.writeback not in ("delta", "splice") or self.unit == "rel_norm"):
            raise InputError(f"policy {self.policy!r} is about codes, which this write-back does not edit")

    def bind(self, sae: SAE, modality: str | None = None, dtype: torch.dtype = torch.float32) -> BoundIntervention:
        """The function ``fn(rows, where)`` for :meth:`host.edit <mmsae.hosts.base.Host.edit>`.

        ``dtype`` is that of the host's tensor, for the log.

        Raises:
            InputError: A feature out of range, a unit without statistics, or statistics of another SAE.
        """
        return BoundIntervention(self, sae, modality, dtype)

    @torch.no_grad()
    def apply(self, sae: SAE, x: Tensor, modality: str | None = None) -> Tensor:
        """Edited activations ``x (N, d)`` of a pooled site that were read before, one row per item."""
        return self.bind(sae, modality)(x.float(), Where(torch.arange(len(x), device=x.device)))

    def raw(self) -> Edit:
        """The edit in raw codes; with ``rel_norm``, in multiples of ``|x|``.

        Raises:
            InputError: A unit that needs statistics without them, or ``kl`` before :meth:`at_kl`.
        """
        edit = self.edit.times(self.strength)
        corpus = any(v == "corpus" for op in edit.ops for v in op.args.values() if isinstance(v, str))
        if not edit.strengths and not corpus:
            return edit
        if self.unit == "kl" and edit.strengths:
            raise InputError("unit 'kl' names a divergence, not a strength: at_kl(measure) finds the strength")
        unit = "raw" if self.unit == "rel_norm" or not edit.strengths else self.unit
        if self.stats is None and (corpus or unit != "raw"):
            raise InputError(f"unit {self.unit!r} needs statistics of the features: give stats=FeatureStats...")
        if self.stats is None:
            return edit.raw(lambda ids: torch.ones(len(ids)), lambda ids: torch.zeros(len(ids)))
        self.edit.check(self.stats.d_sae)
        return edit.raw(lambda ids: self.stats.unit(unit, ids), lambda ids: self.stats.mean_all[ids])

    def vary(self, **values: Iterable[Any]) -> list[Intervention]:
        """Variants, one per combination: ``iv.vary(strength=[1, 2, 5], steps=[(0, 2), (2, 4)])``."""
        names = list(values)
        return [replace(self, **dict(zip(names, v, strict=True))) for v in itertools.product(*values.values())]

    def at_kl(
        self, measure: Callable[[Intervention], float], unit: str = "raw", **search: Any
    ) -> tuple[Intervention, KLSearch]:
        """Find the strength whose divergence is :attr:`strength` nats, for ``unit="kl"``; returns the search too.

        Args:
            measure: Runs the host with an intervention and returns the mean next-token KL from the clean run.
            unit: Unit in which strengths are tried.
            search: Options of :func:`~mmsae.steering.methods.kl_strength.search_kl`.
        """
        found = search_kl(lambda s: measure(replace(self, unit=unit, strength=s)), target=self.strength, **search)
        return replace(self, unit=unit, strength=found.strength), found

    # Files.

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, defaults left out; statistics by their folder.

        Raises:
            InputError: A donor that is a function, or statistics that were not saved.
        """
        if callable(self.donor):
            raise InputError("an intervention whose donor is a function cannot be written down")
        if self.stats is not None and self.stats.path is None:
            raise InputError("an intervention with statistics that were not saved cannot be written down: stats.save()")
        out: dict[str, Any] = {"edit": self.edit.to_dict(), "unit": self.unit}
        for f in fields(self):
            if f.name not in ("edit", "unit", "stats", *_GATE) and getattr(self, f.name) != f.default:
                out[f.name] = getattr(self, f.name)
        return out | ({"stats": self.stats.path} if self.stats else {}) | self.gate.to_dict()

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], stats: FeatureStats | None = None) -> Intervention:
        """Make it of what :meth:`to_dict` made or what was written by hand; ``stats`` replace the folder that it names.

        Raises:
            InputError: Unknown fields, or values that make no intervention.
        """
        values = dict(given)
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise InputError(f"intervention: unknown field {', '.join(sorted(unknown))}")
        path = values.pop("stats", None)
        stats = stats or (FeatureStats.load(path) if path else None)
        try:
            return cls(Edit.from_dict(values.pop("edit", ())), stats=stats, **values)
        except InputError:
            raise
        except (TypeError, AttributeError, ValueError) as e:
            raise InputError(f"intervention: {e}") from e


class BoundIntervention:
    """``fn(rows, where)``: an intervention with its SAE, as a host calls it; made by :meth:`Intervention.bind`.

    ``dtype`` is that of the host's tensor, so that the log tells the change that remains after rounding. ``steps`` is
    for hosts that apply the window outside of the steps' clock (text encoders).
    """

    def __init__(
        self, intervention: Intervention, sae: SAE, modality: str | None = None, dtype: torch.dtype = torch.float32
    ):
        iv = self.iv = intervention
        self.sae, self.modality, self.dtype = sae, sae._modality(modality), dtype
        self.gate, self.log, self.steps = iv.gate, SiteLog(), iv.gate.steps
        self.signed = sae.signed
        iv.edit.check(sae.d_sae)
        algebra.check_policy(sae, iv.policy)
        if sae.training and sae.selector.couples_batch:
            raise InputError(
                "this SAE selects over the whole batch while it trains: sae.eval() makes rows independent, "
                "which guidance (both branches in one batch) needs"
            )
        if iv.stats is not None:
            iv.stats.check(sae, self.modality)
        device = sae.dictionary(self.modality).like.device
        self.edit, self.ids = iv.raw(), torch.tensor(iv.edit.ids, dtype=torch.long, device=device)
        pushes = iv.writeback == "direction" or iv.unit == "rel_norm"
        self.push = self._push(self.edit) if pushes else None
        self.basis: Tensor | None = None
        if iv.writeback == "project_out":
            self.basis = algebra.orthonormal(algebra.atoms(sae, self.modality, self.ids))

    def check_steps(self, n: int) -> None:
        """Refuse a window of steps that a schedule of ``n`` steps does not have."""
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
        device = self.sae.dictionary(self.modality).like.device
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
        if self.gate.guard is not None or iv.writeback == "splice" or iv.policy == "pre" or iv.donor == "mean":
            out = self.sae({self.modality: x})[self.modality]
            codes = out.codes
        elif (self.push is None and self.basis is None) or self.gate.active is not None:
            codes = self.sae.encode(x, self.modality)
        if self.gate.active is not None and iv.writeback != "replace":
            on = self.gate.acting(codes.gather(self.ids)) if len(self.ids) else codes.l0() > 0
            weight = weight * on[:, None]
        if self.gate.guard is not None:
            fvu = algebra.sample_fvu(self.sae, self.modality, out, group(where))
            weight = weight * (fvu < self.gate.guard)[:, None]
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
            along = (x - algebra.origin(self.sae, self.modality, x)) @ self.basis.t()
            along = self.iv.strength * (along if self.signed else along.clamp(min=0))
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
            sparse = algebra.difference(algebra.reselect(out.pre, codes, self.edit, k, where, self.signed), codes)
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

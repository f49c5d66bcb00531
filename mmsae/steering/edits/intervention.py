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

from mmsae.hosts.sites import Where
from mmsae.sae import SAE
from mmsae.steering.edits.bound import Steer
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.gate import FVU, Gate
from mmsae.steering.edits.units import UNITS, FeatureStats
from mmsae.steering.methods.kl_strength import KLSearch, search_kl
from mmsae.types import InputError

WRITEBACKS = ("delta", "splice", "direction", "project_out", "replace")
_GATE = tuple(f.name for f in fields(Gate))
_NEEDS_ONLY = {"direction": "add", "project_out": "ablate", "replace": "ablate"}


@dataclass(frozen=True, eq=False)
class Intervention:
    """What to do at a site; a value, without SAE or host.

    Attributes:
        edit: Of the codes.
        unit: Of the edit's strengths: ``raw``, ``x_mean_active``, ``x_mean_all``, ``x_max``, ``x_pXX``; ``rel_norm``
            (an edit of ``add`` alone moves every row by ``|dx| = gamma |x|``, gamma the largest ``|v|``, whatever its
            code is); ``kl`` (nats of next-token divergence, resolved by :meth:`at_kl`).
        stats: Needed by all units but ``raw``, ``rel_norm`` and ``kl``.
        writeback: See the module.
        policy: ``post``, ``pre`` or ``budget``.
        strength: Multiplies all strengths and factors of the edit (``v, lo, hi, g, b``), and how far ``project_out``
            and ``replace`` go; what :meth:`vary` sweeps.
        donor: Of ``replace``: ``"mean"`` (the sample's other rows), or ``donor(rows, where, mask) -> (N, d)``.
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
    guard: FVU | float | None = None

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

    def bind(self, sae: SAE, modality: str | None = None, dtype: torch.dtype = torch.float32) -> Steer:
        """The function ``fn(rows, where)`` for :meth:`host.edit <mmsae.hosts.base.Backbone.edit>`.

        Args:
            sae: Whose codes are edited.
            modality: Of the site; may be omitted for one-modality SAEs.
            dtype: Of the host's tensor, for the log.

        Raises:
            InputError: A feature out of range, a unit without statistics, or statistics of another SAE.
        """
        return Steer(self, sae, modality, dtype)

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
        """Find the strength whose divergence is :attr:`strength` nats; for ``unit="kl"``.

        Args:
            measure: Runs the host with an intervention and returns the mean next-token KL from the clean run.
            unit: In which strengths are tried.
            search: Options of :func:`~mmsae.steering.methods.kl_strength.search_kl`.

        Returns:
            ``(intervention, search)``; whether the search converged is in its report.
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
        """From what :meth:`to_dict` made, or what was written by hand.

        Args:
            given: Fields.
            stats: Statistics, in place of the folder that ``given`` names.

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

"""The control of every steering result: the same change of codes, written with the atoms of random live features.

Random features are compared at equal ``|dx|`` on every single row, on the same tokens, branches and steps, so that what
remains is the direction. Live ones, because atoms of dead latents point where no data is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmsae.errors import Warned
from mmsae.hosts.sites import Where
from mmsae.sae import SAE
from mmsae.steering.edits.gate import Gate
from mmsae.steering.edits.intervention import BoundIntervention, Intervention
from mmsae.steering.edits.log import SiteLog
from mmsae.steering.measure.sweep import Condition
from mmsae.types import InputError

CONTROLS = 20


@dataclass(frozen=True, eq=False)
class Control:
    """Stands where an intervention stands, in ``attach`` and sweeps."""

    intervention: Intervention  #: What is controlled; it edits codes (write-back ``delta`` or ``direction``).
    #: ``(L,)`` features to draw from; None: those that fired in the intervention's statistics.
    live: Tensor | None = None
    seed: int = 0

    def draw(self, sae: SAE) -> dict[int, int]:
        """``{feature of the edit: the random one whose atom it gets}``.

        Raises:
            InputError: No features to draw from, or too few.
        """
        iv = self.intervention
        live = self.live if self.live is not None else None if iv.stats is None else iv.stats.live()
        if live is None:
            raise InputError("random controls are drawn from live features: give live=, or statistics of the features.")
        own = live.tolist() if iv.edit.everything else list(iv.edit.ids)
        pool = live if iv.edit.everything else live[~torch.isin(live.cpu(), torch.tensor(own))]
        if len(pool) < max(2, len(own)):
            raise InputError(f"a control of {len(own)} features needs as many other live ones, there are {len(pool)}.")
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(self.seed))
        return dict(zip(own, pool[order][: len(own)].tolist(), strict=True))

    def bind(self, sae: SAE, modality: str | None = None, dtype: torch.dtype = torch.float32) -> Redirected:
        """The function for ``host.edit``, see :meth:`mmsae.steering.edits.intervention.Intervention.bind`."""
        iv = self.intervention
        if iv.writeback not in ("delta", "direction"):
            raise InputError(f"writeback {iv.writeback!r} has no random control: it does not write atoms.")
        unit = "rel_norm" if iv.unit == "rel_norm" else "raw"
        plain = replace(iv, edit=iv.raw(), unit=unit, stats=None, strength=1.0)
        other = with_atoms(sae, sae._modality(modality), self.draw(sae))
        return Redirected(iv.bind(sae, modality, dtype), plain.bind(other, modality, dtype))


class Redirected:
    """``fn(rows, where)``: rows move as far as under ``steer``, in the direction in which ``other`` moves them."""

    def __init__(self, steer: BoundIntervention, other: BoundIntervention):
        self.steer, self.other, self.steps = steer, other, steer.steps

    @property
    def log(self) -> SiteLog:
        """What it did; sizes are those of the intervention that it controls."""
        return self.steer.log

    @property
    def gate(self) -> Gate:
        """Where it acts."""
        return self.steer.gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        self.steer.gate = self.other.gate = gate

    def __call__(self, rows: Tensor, where: Where) -> Tensor:
        """Redirected rows ``(N, d)``; the very same object where the intervention changes nothing."""
        new = self.steer(rows, where)
        if new is rows:
            return rows
        size = (new - rows).norm(dim=1, keepdim=True)
        change = self.other(rows, where) - rows
        return rows + change * (size / change.norm(dim=1, keepdim=True).clamp(min=1e-12))


def with_atoms(sae: SAE, modality: str, atoms: dict[int, int]) -> SAE:
    """An SAE that encodes as before and writes some features with the atoms of others; shares all other weights."""
    key = "shared" if "shared" in sae.dictionaries else modality
    dictionary = copy.copy(sae.dictionaries[key])
    rows = dictionary.rows().detach().clone()
    rows[list(atoms)] = dictionary.rows().detach()[list(atoms.values())]
    dictionary.rows = lambda: rows  # its own weights stay: a tied encoder reads them
    out = copy.copy(sae)
    out._modules = {**sae._modules, "dictionaries": nn.ModuleDict({**sae.dictionaries, key: dictionary})}
    return out


def controls(
    conditions: Sequence[Condition], n: int = CONTROLS, live: Tensor | None = None, seed: int = 0
) -> list[Condition]:
    """``n`` random controls of every condition, to be swept beside them; see :class:`Control` for ``live``.

    Control ``j`` draws the same features at every strength, so that it has a dose response too.

    Raises:
        InputError: A condition that steers by a function, which has no atoms to exchange.
    """
    out = []
    if live is not None and n > len(live):
        warnings.warn(
            f"{n} random controls were asked for, but {len(live)} features are live: {len(live)} are used.", Warned
        )
        n = len(live)
    for condition in conditions:
        how = condition.steering
        if callable(how):
            raise InputError(f"{condition.name} steers by a function: it has no random control.")
        pairs = list(how.items() if isinstance(how, Mapping) else how)
        for j in range(n):
            own = [(site, (sae, Control(iv, live, seed + 1000 * i + j))) for i, (site, (sae, iv)) in enumerate(pairs)]
            out.append(condition._replace(steering=own, control=j))
    return out

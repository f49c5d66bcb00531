"""A store's rows on a device, where batches are gathered instead of being sent one by one."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmsae.activations.store import ActivationStore, not_finite
from mmsae.device import sent
from mmsae.files import nbytes
from mmsae.types import InputError, Tokens

SHARE = 0.5  #: Of the device's free memory that rows may take where nobody asked for them: a step needs the rest.


class ResidentRows:
    """Rows of some sites, as stored, with what belongs to each: gradient, item, position, flag.

    Args:
        store: The store; it is read once, from its first file to its last.
        names: ``{modality: site name}``, or ``{site name: site name}`` for :meth:`at`.
        device: Where they go.

    Attributes:
        x: ``{modality: (N, d)}`` in the stored type.
    """

    _COLUMNS = ("x", "grad", "item", "position", "special")

    def __init__(self, store: ActivationStore, names: Mapping[str, str], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.x = {m: self._load(store, n, n) for m, n in names.items()}
        self.grad = {m: self._load(store, n, f"{n}.grad") for m, n in names.items() if store.has(n, "grad")}
        self.item: dict[str, Tensor] = {}
        for m, n in names.items():
            if not store.spec.pooled(n):
                items = store.items_of_rows(n, np.arange(store.spec.rows[n]))
                self.item[m] = torch.from_numpy(items).to(self.device)
        self.position, self.special = (
            {m: self._load(store, n, f"{n}.{c}").to(kind) for m, n in names.items() if store.has(n, c)}
            for c, kind in (("position", torch.int64), ("special", torch.bool))
        )

    def _load(self, store: ActivationStore, name: str, column: str) -> Tensor:
        out, at, bad = None, 0, []
        for part in store.parts(name, column):
            if out is None:
                out = torch.empty(store.spec.rows[name], *part.shape[1:], dtype=part.dtype, device=self.device)
            here = out[at : at + len(part)]
            here.copy_(part)
            if column == name:
                bad.append(not_finite(here).cpu().numpy() + at)
            at += len(part)
        if column == name:
            store.found_not_finite(name, np.concatenate(bad))
        return out

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for c in self._COLUMNS for t in getattr(self, c).values())

    def at(self, names: Mapping[str, str]) -> ResidentRows:
        """The same rows of some of the sites, by other keys: ``{new key: key}``."""
        own = copy.copy(self)
        for c in self._COLUMNS:
            column = getattr(self, c)
            setattr(own, c, {new: column[key] for new, key in names.items() if key in column})
        return own

    def numbers(self, rows: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Row numbers of a window on the device, sent without waiting for it."""
        return {m: sent(torch.from_numpy(r), self.device) for m, r in rows.items()}

    def rows(self, ids: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``{modality: (n, d)}`` rows by number, and their gradients, as stored."""
        x, grad = ({m: v.index_select(0, ids[m]) for m, v in some.items()} for some in (self.x, self.grad))
        return x, grad

    def tokens(self, ids: Mapping[str, Tensor]) -> Tokens:
        """A batch of rows by number, rows as stored; ``item`` is the number of the item in the store."""
        x, grad = self.rows(ids)
        item = {m: self.item[m].index_select(0, i) if m in self.item else i for m, i in ids.items()}
        position, special = (
            {m: v.index_select(0, ids[m]) for m, v in some.items()} for some in (self.position, self.special)
        )
        return Tokens(x, item, None, position or None, special or None, grad=grad or None)


def resident_bytes(store: ActivationStore, names: Mapping[str, str]) -> int:
    """Bytes that the rows of some sites take on a device, with what belongs to them."""
    spec, total = store.spec, 0
    size = torch.empty(0, dtype=getattr(torch, spec.dtype)).element_size()
    for n in names.values():
        each = spec.sites[n].width * size * (1 + store.has(n, "grad")) + 8 * store.has(n, "position")
        total += spec.rows[n] * (each + 8 * (not spec.pooled(n)) + store.has(n, "special"))
    return total


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a device's memory that nobody uses; None where that is not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def make_resident(
    store: ActivationStore, names: Mapping[str, str], device: torch.device, asked: bool | str = "auto"
) -> tuple[ResidentRows | None, str]:
    """Move the rows of a store to a device where that was asked for, or where it is a GPU and they fit.

    Args:
        store: The store.
        names: ``{modality: site name}``.
        device: Of the training.
        asked: ``True``, ``False`` or ``"auto"``: on a GPU, where they take at most :data:`SHARE` of its free memory.

    Returns:
        The rows or None, and a sentence that says why; empty where there was nothing to decide.

    Raises:
        InputError: They were asked for and do not fit.
    """
    if asked is False or (asked == "auto" and device.type != "cuda"):
        return None, ""
    need, free = resident_bytes(store, names), free_bytes(device)
    share = f", {need / free:.0%} of the {nbytes(free)} that are free there" if free else ""
    what = f"{store.folder}: the rows of {', '.join(names)} take {nbytes(need)} on {device}{share}"
    on_disk = "they stay on disk, and the next batch is sent while a step runs"
    if asked == "auto" and need > SHARE * free:
        return None, f"{what}, and may take {SHARE:.0%}: {on_disk} (data.resident true moves them all the same)"
    try:
        return ResidentRows(store, names, device), f"{what}: moved there once (data.resident false leaves them on disk)"
    except torch.OutOfMemoryError:
        if asked == "auto":
            return None, f"{what}, which it could not give: {on_disk}"
        raise InputError(
            f"{what}, which it could not give: use data.resident false, which leaves them on disk"
        ) from None

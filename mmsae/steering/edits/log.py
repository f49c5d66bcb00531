"""What an intervention did: relative size of the change and share of tokens touched, by step of the generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmsae.hosts.sites import Where


class _Totals:
    def _totals(self) -> tuple[int, int, float]:
        """Rows, how many of them were changed, and the sum of ``|dx| / |x|`` of these."""
        raise NotImplementedError

    @property
    def share(self) -> float:
        """Share of all rows that were changed."""
        rows, changed, _ = self._totals()
        return changed / max(1, rows)

    @property
    def relative(self) -> float:
        """Mean ``|dx| / |x|`` of the rows that were changed; 0 if none was."""
        _, changed, total = self._totals()
        return total / max(1, changed)


class SiteLog(_Totals):
    """Sums over the calls at one site, indexed by step id and phase, never by call count.

    Sizes are realised ones: a change that the host's precision rounds away counts as none.
    """

    def __init__(self, site: str = ""):
        self.site = site
        self._sums: dict[tuple[int | None, str], list[Any]] = {}

    def note(self, where: Where, relative: Tensor | None, touched: int | Tensor) -> None:
        """One call, all its rows, and ``(n,)`` ``|dx| / |x|`` of those that the edit changed; None for none."""
        key = (where.step, "decode" if where.start >= max(1, where.prompt or 0) else "prefill")
        calls, rows, count, total, largest = self._sums.get(key, (0, 0, 0, 0.0, 0.0))
        if relative is not None and len(relative):  # kept as tensors: reading them would wait for the device
            total = total + relative.double().sum()
            largest = torch.maximum(torch.as_tensor(largest, device=relative.device).to(relative), relative.max())
        self._sums[key] = (calls + 1, rows + len(where.item), count + touched, total, largest)

    def table(self) -> list[dict[str, Any]]:
        """One row per step and phase: ``site, step, phase, calls, rows, share, relative, largest``.

        ``share`` of the rows was changed, on these ``|dx|/|x|`` was ``relative`` in the mean and ``largest`` at most.
        """
        return [
            {"site": self.site, "step": step, "phase": phase, "calls": calls, "rows": rows}
            | {"share": (n := int(count)) / max(1, rows), "relative": float(total) / max(1, n)}
            | {"largest": float(largest)}
            for (step, phase), (calls, rows, count, total, largest) in self._sums.items()
        ]

    @property
    def calls(self) -> int:
        """How often the site was computed."""
        return sum(s[0] for s in self._sums.values())

    def _totals(self) -> tuple[int, int, float]:
        sums = self._sums.values()
        return sum(s[1] for s in sums), sum(int(s[2]) for s in sums), sum(float(s[3]) for s in sums)


class Log(_Totals):
    """Logs of the sites of one attachment, in its order."""

    def __init__(self, sites: list[SiteLog]):
        self.sites = sites

    def __getitem__(self, i: int) -> SiteLog:
        return self.sites[i]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[SiteLog]:
        return iter(self.sites)

    def table(self) -> list[dict[str, Any]]:
        """Rows of all sites."""
        return [row for s in self.sites for row in s.table()]

    def _totals(self) -> tuple[int, int, float]:
        rows, changed, total = zip(*(s._totals() for s in self.sites), strict=True) if self.sites else ((), (), ())
        return sum(rows), sum(changed), sum(total)

"""Detect and replace: codes say where a concept is, and activations without it take its place (arXiv 2606.31699).

Pushing a code takes activations where the host never saw any; replacing the detected positions by activations that lack
the concept stays on its data. Two donors: the same noise drawn from a prompt without the concept, or the rest of the
same image. Only the abstract of the paper was available: thresholds and donors are [R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mmsae.hosts.sites import Where
from mmsae.sae import SAE
from mmsae.steering.edits.attach import attach
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.edits.log import Log
from mmsae.types import InputError


class Recording:
    """Rows of one run, donated in another with the same seeds, steps and batches.

    ``with host.edit(site, recording, where=True): host.generate(...)`` records; ``recording.donor`` donates. Rows are
    found again by step and, within a step, by order of the calls (schedulers of order 2 call twice). All are held:
    ``steps * rows * d`` numbers where the host computes.
    """

    def __init__(self) -> None:
        self.kept: dict[int | None, list[Tensor]] = {}
        self._next: dict[int | None, int] = {}

    def __call__(self, rows: Tensor, where: Where) -> Tensor:
        """Keep the rows of a call; changes nothing."""
        self.kept.setdefault(where.step, []).append(rows.detach().clone())
        return rows

    def donor(self, rows: Tensor, where: Where, mask: Tensor) -> Tensor:
        """The recorded rows of the same call, for ``Intervention(..., writeback="replace", donor=)``.

        Raises:
            InputError: No such call was recorded, or it had other rows.
        """
        kept = self.kept.get(where.step)
        if not kept:
            raise InputError(f"no rows were recorded for step {where.step}: the donor's run had {len(self.kept)} steps")
        i = self._next.get(where.step, 0)
        self._next[where.step] = (i + 1) % len(kept)
        if kept[i].shape != rows.shape:
            raise InputError(f"the recorded rows have shape {tuple(kept[i].shape)}, these {tuple(rows.shape)}")
        return kept[i]


def replacement(
    ids: Sequence[int], tau: float | Sequence[float], donor: Any = "mean", dilate: int = 1, **gates: Any
) -> Intervention:
    """Positions where a latent of a concept exceeds its threshold, and their neighbours, get a donor's activation.

    ``M_p = max_i z_i(p) / tau_i > 1``. Both guidance branches are treated, each by what is detected in it, for
    guidance would bring back what stays in one of them.

    Args:
        ids: Latents of the concept, ascending.
        tau: Code above which each counts, one number or one per latent; a share of its mean when active, say.
        donor: ``"mean"``: the mean of the sample's other positions plus the position's own reconstruction error; or
            :meth:`Recording.donor` of a run without the concept.
        dilate: Cells that the mask grows on every side.
        **gates: Fields of the intervention: ``steps``, ``branch``, ``space``, ...
    """
    return Intervention(
        Edit.ablate(ids), unit="raw", writeback="replace", donor=donor, dilate=dilate, active=tau,
        **{"branch": "all", **gates},
    )  # fmt: skip


def from_prompts(
    host: Any,
    site: Any,
    sae: SAE,
    ids: Sequence[int],
    tau: float | Sequence[float],
    without: Callable[[str], str],
    dilate: int = 1,
    gates: dict[str, Any] | None = None,
    **options: Any,
) -> Callable[[Sequence[str], Sequence[int]], Any]:
    """Steering for a sweep, whose donor is the same noise drawn from the prompt that ``without`` rids of the concept.

    Every batch is drawn twice: once from the donors' prompts, whose rows at the site are held for all steps (``steps *
    rows * d`` numbers), and once with the :func:`replacement`. ``options`` of ``host.generate`` are those of the run
    that is steered; all prompts are one batch by default.
    """

    @contextmanager
    def way(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Log]:
        recording = Recording()
        with host.edit(site, recording, where=True):
            host.generate([without(p) for p in prompts], seed=list(seeds), **{"batch_size": len(prompts), **options})
        iv = replacement(ids, tau, recording.donor, dilate, **(gates or {}))
        with attach(host, {site: (sae, iv)}) as log:
            yield log

    return way

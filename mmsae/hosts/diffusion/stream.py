"""Activations of generations as a stream: some steps and some positions of every picture, nothing held for long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmsae.hosts.base import Sites
from mmsae.hosts.diffusion.call import Call, check_edits, n_steps, run_call
from mmsae.hosts.diffusion.tap import Edit
from mmsae.hosts.hooks import Done
from mmsae.hosts.sites import COND, UNCOND, Where
from mmsae.types import IMAGE, InputError, Site, Tokens

if TYPE_CHECKING:
    from mmsae.hosts.diffusion.host import DiffusionHost

Branch = Literal["cond", "uncond", "all"]
_BRANCHES = {"cond": (COND,), "uncond": (UNCOND,), "all": (UNCOND, COND)}


def stream(
    host: DiffusionHost,
    prompts: Sequence[str],
    sites: Site | str | Sites,
    *,
    steps: int = 20,
    sample_steps: int | Sequence[int] | None = None,
    positions: int | None = None,
    branch: Branch = "cond",
    guidance: float = 3.0,
    seed: int | Sequence[int] = 0,
    negative: str | Sequence[str] | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Iterator[Tokens]:
    """Activations while pictures are made of prompts; a call of the pipeline ends after the last step that is wanted.

    Args:
        host: The pipeline.
        prompts: Texts.
        sites: One site, or one per modality; text sites are read while prompts are encoded.
        steps: Of the scheduler.
        sample_steps: How many of them are read, drawn anew for every call; or which; None: all.
        positions: How many positions of a picture are read at a step, drawn anew for every call and step; None: all.
        branch: ``cond``, ``uncond`` or ``all``.
        guidance: As in ``generate``, which is what statistics of the steering to come should be taken at.
        seed: Of noise and draws, as in ``generate``: one number is the same noise for every prompt.
        negative: As in ``generate``.
        batch_size: Pictures per call.
        **options: Of the pipeline's call.

    Yields:
        Tokens of one call: ``item`` counts the prompts of that call, ``uids`` are their numbers among all prompts,
        ``position`` is row by row in the map.

    Raises:
        InputError: Two sites of one modality, a step outside of the schedule, or a branch that does not run.
    """
    chosen = _one_each(host, sites)
    if branch not in _BRANCHES:
        raise InputError(f"branch {branch!r} is not one of {', '.join(_BRANCHES)}.")
    options |= {"steps": steps, "guidance": guidance, "output_type": "latent"}
    call = Call.of(prompts, negative, seed, 1, options)
    check_edits(host, options)
    for lo in range(0, len(call.items), batch_size):
        part = call.part(lo, lo + batch_size)
        draw = torch.Generator().manual_seed(part.seeds[0] * 1_000_003 + lo)
        wanted = _steps(sample_steps, n_steps(options), draw)
        got: dict[str, list[tuple[Tensor, Where]]] = {m: [] for m in chosen}
        with suppress(Done), ExitStack() as stack:
            for m, site in chosen.items():
                keep = _keeper(got[m], _BRANCHES[branch], m == IMAGE, positions, draw)
                read = Edit(host._target(site), at=wanted if m == IMAGE else None)
                stack.enter_context(host._open(read, keep))
            run_call(host, part, options, last=max(wanted) if IMAGE in chosen else -1)
        for m, rows in got.items():
            if not rows:
                why = f"branch {branch!r} does not run at guidance {guidance}"
                raise InputError(f"nothing was read at {chosen[m]}: {why}.")
        yield _tokens(got, part.items)


def _one_each(host: DiffusionHost, sites: Site | str | Sites) -> dict[str, Site]:
    given = list(sites.values()) if isinstance(sites, Mapping) else [sites] if isinstance(sites, (str, Site)) else sites
    chosen = [host.site(s) for s in given]
    names = [s.modality for s in chosen]
    if len(set(names)) != len(names):
        raise InputError(f"stream takes one site per modality, got {', '.join(names)}; use edits to read several.")
    return dict(zip(names, chosen, strict=True))


def _steps(sample: int | Sequence[int] | None, n: int, draw: torch.Generator) -> set[int]:
    if isinstance(sample, int):
        sample = torch.randperm(n, generator=draw)[: max(1, sample)].tolist()
    wanted = set(range(n) if sample is None else sample)
    if not wanted or min(wanted) < 0 or max(wanted) >= n:
        raise InputError(f"sample_steps is {sorted(wanted)}, but the schedule has steps 0 to {n - 1}.")
    return wanted


def _keeper(
    got: list, branches: tuple[int, ...], maps: bool, positions: int | None, draw: torch.Generator
) -> Callable[[Tensor, Where], Tensor]:
    """An edit that changes nothing and keeps some of the rows in ``got``."""

    def keep(rows: Tensor, where: Where) -> Tensor:
        on_now = set(branches) & set(where.branch.unique().tolist())
        again = not maps and any(on_now <= set(w.branch.tolist()) for _, w in got)
        if not on_now or again:  # text is encoded once more for an edit with a window of steps
            return rows
        on = torch.isin(where.branch, where.branch.new_tensor(branches))
        if maps and positions is not None and where.position is not None:
            n = int(where.position.max()) + 1
            on &= torch.isin(where.position, torch.randperm(n, generator=draw)[:positions].to(on.device))
        kept = Where(*(v[on] if isinstance(v, Tensor) else v for v in where))
        got.append((rows[on], kept))
        return rows

    return keep


def _tokens(got: Mapping[str, list[tuple[Tensor, Where]]], items: Tensor) -> Tokens:
    first = int(items[0])
    x = {m: torch.cat([r for r, _ in rows]) for m, rows in got.items()}
    item = {m: torch.cat([w.item for _, w in rows]) - first for m, rows in got.items()}
    fields: dict[str, dict[str, Tensor]] = {"position": {}, "special": {}}
    for name, found in fields.items():
        for m, rows in got.items():
            if getattr(rows[0][1], name) is not None:
                found[m] = torch.cat([getattr(w, name) for _, w in rows])
    return Tokens(x, item, [str(i) for i in items.tolist()], **{k: v or None for k, v in fields.items()})

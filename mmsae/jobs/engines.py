"""Who does a job: the engine that its options ask for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from mmsae.errors import InputError
from mmsae.jobs.processes import Local
from mmsae.jobs.queue import WHOLE, Merging, PartOf, parse_part
from mmsae.jobs.units import Engine
from mmsae.options import Run, Spread, at_least


def engine_of(spread: Spread, run: Run = Run(), given: Engine | None = None) -> AbstractContextManager[Engine]:
    """A context manager that gives the engine, and ends quietly where other parts of the job have to go on.

    Args:
        spread: Options that say who works.
        run: Where and how each computes.
        given: An engine that is there already.

    Raises:
        InputError: Options that cannot be, or do not go together.
    """
    if given is not None:
        return nullcontext(given)
    at_least(1, devices=spread.devices)
    at_least(0, gpus=spread.gpus, retries=spread.retries)
    part = "" if spread.part == WHOLE else spread.part
    if part and spread.merge:
        raise InputError(f"part is {part} and merge is asked for; a part does not merge: give one of the two")
    if (part or spread.merge) and spread.engine != "processes":
        asked = f"part is {part}" if part else "merge is asked for"
        raise InputError(f"engine is {spread.engine} and {asked}; parts are of processes, and Ray needs none")
    if spread.gpus is not None and spread.engine != "ray":
        raise InputError(f"gpus is {spread.gpus:g} and engine {spread.engine}; only ray shares GPUs")
    if spread.engine == "ray":
        from mmsae.jobs.ray import RayWorkers

        return RayWorkers(spread.devices, spread.gpus, spread.retries, run.device, run.progress)
    size = spread.devices or 1
    if spread.merge:
        return Merging(size)
    return PartOf(*parse_part(part), size) if part else Local(size)

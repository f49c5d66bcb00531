"""Resumable work: one part per unit, a folder that is whole or not there, and who does it."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__, {"folder": "JobFolder same_job", "stages": "StageLog Stages", "units": "Parts Unit units"}
)

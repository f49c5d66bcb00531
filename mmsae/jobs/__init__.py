"""Resumable work: one part per unit, a folder that is whole or not there, and who does it."""

from mmsae.jobs.folder import JobFolder, same_job
from mmsae.jobs.units import Parts, Unit, units

__all__ = ["JobFolder", "Parts", "Unit", "same_job", "units"]

"""Resumable work: one part per unit, and a folder that is whole or not there."""

from mmsae.jobs.units import Unit, done, part_path, run_units, units, write_part

__all__ = ["Unit", "done", "part_path", "run_units", "units", "write_part"]

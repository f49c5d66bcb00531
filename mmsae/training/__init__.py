"""Lightning training of SAEs."""

from mmsae.training.callbacks import DeadLatentReport, ExportSAE, RunCheckpoint
from mmsae.training.lit import LitSAE
from mmsae.training.schedule import Schedule

__all__ = ["DeadLatentReport", "ExportSAE", "LitSAE", "RunCheckpoint", "Schedule"]

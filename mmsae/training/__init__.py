"""Lightning training of SAEs."""

from mmsae.training.callbacks import DeadLatentReport, ExportSAE
from mmsae.training.checkpoint import AtomicCheckpointIO, RunCheckpoint
from mmsae.training.lit import LitSAE
from mmsae.training.schedule import Schedule

__all__ = ["AtomicCheckpointIO", "DeadLatentReport", "ExportSAE", "LitSAE", "RunCheckpoint", "Schedule"]

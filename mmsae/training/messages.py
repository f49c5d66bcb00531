"""What Lightning says while it trains: on stdout, without advertisements and without warnings that do not apply."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from typing import TextIO

_NOT_SO = (
    "LightningCLI's args parameter is intended",  # the arguments come from mmsae's own entry point on purpose
    ".*isinstance.treespec, LeafSpec.. is deprecated",  # about Lightning's own use of torch
    "Sparse CSR tensor support is in beta",  # used for one product that is tested against the dense one
    "You have overridden `transfer_batch_to_device` in `LightningModule`",  # and there is no other
    ".*is smaller than the logging interval",  # steps are counted over epochs
    "It is recommended to use .self.log.*sync_dist=True",  # the metrics themselves are summed over ranks
    "predict returned None if it was on purpose",  # jobs write files
    "Total length of .list. across ranks is zero",  # a job that was finished before
)


class _ToStdout(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the time."""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Lightning sets it; what it sets is ignored."""


def tidy_messages() -> None:
    """Have Lightning's messages go to stdout from now on, so that stderr holds warnings and errors alone."""
    for message in _NOT_SO:
        warnings.filterwarnings("ignore", message=message)
    handler = _ToStdout()
    handler.addFilter(lambda record: not re.search("litlogger|TPU", record.getMessage()))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False

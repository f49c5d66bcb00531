"""What datamodules share whose batches are read at sites of a choice, or at several choices side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from datamodules.shared_batches import SharedBatches


class SitesDataModule(SharedBatches):
    """Activations at one site of each modality, or at as many choices of those as SAEs that are trained together have.

    Args:
        sites: The choice of one SAE.

    Attributes:
        choices: ``{name: sites}``; where there are any, batches are :class:`~mmsae.types.SideBySide`.
    """

    def __init__(self, sites: Any) -> None:
        super().__init__()
        self.chosen_sites, self.choices = sites, {}

    def read_at(self, choices: Mapping[str, Any]) -> None:
        """Have batches hold the activations at several choices of sites."""
        self.choices = dict(choices)

    def at(self, name: str) -> SitesDataModule:
        """What the SAEs of one choice see of this datamodule; the data are shared."""
        own = copy.copy(self)
        own.chosen_sites, own.choices, own.choice = self.choices[name], {}, name
        return own

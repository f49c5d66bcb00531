"""The stages of a benchmark, by which an interrupted one is gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsae.jobs.folder import JobFolder
from mmsae.jobs.stages import Stages


def stages_of(root: Path, recipe: dict[str, Any], progress: bool = True) -> Stages:
    """The stages of a benchmark; each leaves what it returned in a file of its name.

    Raises:
        InputError: The folder holds a benchmark with other settings.
    """
    folder = JobFolder(root, recipe, "mmsae bench", writes=(), file="recipe.json", holds="a benchmark")
    folder.note()
    return Stages(folder, progress=progress)

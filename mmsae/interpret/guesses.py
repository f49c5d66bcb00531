"""The best guess that was found for every latent, whether or not it held up: what names are chosen from, and what
scores of controls are of.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsae.files import read_columns
from mmsae.types import InputError

FOLDER, FILE = "names", "candidates.parquet"


class Candidates(NamedTuple):
    """What methods suggested, one row per latent, method and rank."""

    latent: np.ndarray  #: ``(R,) int32``
    modality: np.ndarray  #: ``(R,)`` str whose evidence it was found in
    method: np.ndarray  #: ``(R,)`` str
    phrase: np.ndarray  #: ``(R,)`` str
    score: np.ndarray  #: ``(R,)``
    margin: np.ndarray  #: ``(R,)``
    z: np.ndarray  #: ``(R,)`` NaN for methods that have none
    judge: np.ndarray  #: ``(R,)`` str what AUROCs are of: ``vectors`` or ``words``
    #: ``(R,)`` on the items that it was found on, the mean of random and hard negatives: what candidates are chosen by
    auroc_train: np.ndarray
    auroc: np.ndarray  #: ``(R,)`` on unseen items, weighted by value; NaN for those that were not chosen
    chosen: np.ndarray  #: ``(R,)`` bool, one row per latent

    def rows(self, which: np.ndarray) -> Candidates:
        """Some of the rows."""
        return Candidates(*(v[which] for v in self))

    @classmethod
    def joined(cls, parts: list[Candidates]) -> Candidates:
        """Rows of several; none of none."""
        if not parts:
            texts = {k: np.zeros(0, object) for k in ("modality", "method", "phrase", "judge")}
            empty = {k: np.zeros(0) for k in cls._fields} | texts
            return cls(**empty | {"latent": np.zeros(0, np.int32), "chosen": np.zeros(0, bool)})
        return cls(*(np.concatenate(v) for v in zip(*parts, strict=True)))

    def write(self, folder: Path) -> Path:
        """Write them into a folder of names."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from mmsae.files import atomic_file

        columns = {
            k: pa.array(v.tolist(), pa.string()) if v.dtype.kind in "UO" else pa.array(v)
            for k, v in self._asdict().items()
        }
        with atomic_file(folder / FILE) as temp:
            pq.write_table(pa.table(columns), temp)
        return folder / FILE

    @classmethod
    def read(cls, folder: str | Path) -> Candidates:
        """Those of a folder of evidence.

        Raises:
            InputError: ``mmsae name`` has not been there, or one that wrote other columns.
        """
        path, nan = Path(folder) / FOLDER / FILE, float("nan")
        if not path.exists():
            raise InputError(f"{folder} has no {FOLDER}/{FILE}: run mmsae name {folder} first")
        old = {"judge": "", "margin": nan, "z": nan, "auroc_train": nan, "auroc": nan}
        columns = read_columns(path, cls._fields, old, f"run mmsae name {folder} again")
        return cls(**{k: v.astype(str) if v.dtype.kind == "O" and k != "chosen" else v for k, v in columns.items()})

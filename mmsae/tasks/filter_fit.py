"""The first stage of a filter job: fitted weights, from a file or from a pass over a sample of the tars."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsae.tasks.filter_folder import JobFolder
from mmsae.tasks.filter_run import Pass, Processes, judged, run_pass
from mmsae.tasks.filter_weights import FitSample, PairWeights, fit_weights
from mmsae.tasks.pair_scorer import PairReader
from mmsae.tasks.selection import draw
from mmsae.types import InputError

WEIGHTS = "weights.safetensors"


def identity(paths: Sequence[str]) -> list[list[Any]]:
    """Names and sizes of shards."""
    return [[Path(p).name, os.path.getsize(p)] for p in paths]


def digest(path: str) -> str:
    """Hash of a small file."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e


def prepare_weights(
    folder: JobFolder,
    run: Pass,
    reader: PairReader,
    clean: list[str],
    weights: str,
    names: str | None,
    processes: Processes,
) -> PairWeights:
    """Fitted weights, in the draft of the result.

    Args:
        folder: Of the job.
        run: The ``score`` pass that is to follow.
        reader: Host and SAE.
        clean: Calibration shards, if any.
        weights: A file, or ``auto``.
        names: JSON file of names, or None.
        processes: Who does the pass.
    """
    file = folder.draft / WEIGHTS
    if weights != "auto":
        fitted = PairWeights.load(weights)
        fitted.check(weights, _about(reader))
        if run.spec.score == "pair_calibrated" and fitted.calibrator is None:
            raise InputError(f"{weights} was not fitted on a clean calibration set, so it has no pair_calibrated")
        fitted.save(file)
        return fitted
    if not (file.exists() and file.with_suffix(".json").exists()):
        paths = clean or sample_tars(run.paths, folder.job["fit_samples"], run.spec.seed)
        fit_run = run._replace(kind="fit", paths=paths, folder=str(folder.work / "fit"))
        sample, faults = FitSample.read(run_pass(fit_run, processes, reader))
        judged(faults, run.fault_limit)
        about = _about(reader) | {
            "data": hashlib.blake2b(json.dumps(identity(paths)).encode(), digest_size=16).hexdigest(),
            "shards": len(paths),
            "clean": bool(clean),
            "seed": run.spec.seed,
        }
        fit_weights(sample, about, calibrate=bool(clean), seed=run.spec.seed, names=_names(names)).save(file)
        shutil.rmtree(folder.work / "fit", ignore_errors=True)
    return PairWeights.load(file)


def _about(reader: PairReader) -> dict[str, Any]:
    sites = {m: f"{s.module}:{s.io}[{s.tokens}]" for m, s in sorted(reader.sites.items())}
    return {**reader.fingerprints, "sites": sites}


def _names(path: str | None) -> dict[int, str]:
    if path is None:
        return {}
    try:
        return {int(j): str(name) for j, name in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"names {path} is not a JSON object of latent: name: {e}") from e


def sample_tars(paths: Sequence[str], n: int, seed: int) -> list[str]:
    """Whole tars with at least n samples together, drawn by a hash of seed and file name, in the order of the job."""
    from mmsae.shards import count_samples

    chosen, have = set(), 0
    for path in sorted(paths, key=lambda p: (draw(Path(p).name, seed), p)):
        if have < n:
            chosen.add(path)
            have += count_samples(path)
    return [p for p in paths if p in chosen]

"""The first stage of a filter job: fitted weights, from a file or from a pass over a sample of the tars."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmsae.files import read_text
from mmsae.filtering.pair_weights import FitSample, PairWeights, fit_weights, name_concepts
from mmsae.filtering.run import Pass, Processes, judged, run_pass
from mmsae.filtering.scorers.clip import PairReader, Scorer
from mmsae.jobs.folder import JobFolder
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.shards import count_samples, draw, identity, shard_name
from mmsae.types import InputError

WEIGHTS = "weights.safetensors"


def digest(path: str) -> str:
    """Hash of a small file, or of the weights in a folder."""
    from mmsae.lvlm.weights.file import tensors_of

    file = tensors_of(path) if Path(path).is_dir() else Path(path)
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e


def prepare_weights(
    folder: JobFolder,
    run: Pass,
    reader: PairReader,
    clean: list[str],
    weights: str,
    names: dict[int, str],
    processes: Processes,
) -> PairWeights:
    """Fitted weights, in the draft of the result.

    Args:
        folder: Of the job.
        run: The ``score`` pass that is to follow.
        reader: Host and SAE.
        clean: Calibration shards, if any.
        weights: A file, or ``auto``.
        names: ``{latent: name}``.
        processes: Who does the pass.
    """
    file = folder.draft / WEIGHTS
    if weights != "auto":
        fitted = PairWeights.load(weights)
        fitted.check(weights, _about(reader))
        if run.spec.score == "pair_calibrated" and fitted.calibrator is None:
            raise InputError(f"{weights} was not fitted on a clean calibration set, so it has no pair_calibrated")
        if processes.lead:
            fitted.save(file)
        processes.wait()
        return fitted
    if not processes.agree(file.exists() and file.with_suffix(".json").exists()):
        paths = sample_tars(clean or run.paths, folder.job["fit_samples"], run.spec.seed)
        fit_run = run._replace(kind="fit", paths=paths, folder=str(folder.work / "fit"))
        parts = run_pass(fit_run, processes, reader)
        if processes.lead:
            sample, faults = FitSample.read(parts)
            judged(faults, run.fault_limit)
            about = _about(reader) | {
                "data": hashlib.blake2b(json.dumps(identity(paths)).encode(), digest_size=16).hexdigest(),
                "shards": len(paths),
                "clean": bool(clean),
                "seed": run.spec.seed,
            }
            fit_weights(sample, about, calibrate=bool(clean), seed=run.spec.seed, names=names).save(file)
            shutil.rmtree(folder.work / "fit", ignore_errors=True)
        processes.wait()
    return PairWeights.load(file)


def _about(reader: PairReader) -> dict[str, Any]:
    sites = {m: f"{s.module}:{s.io}[{s.tokens}]" for m, s in sorted(reader.sites.items())}
    return {**reader.fingerprints, "sites": sites}


def read_names(path: str | None) -> dict[int, str]:
    """``{latent: name}`` of a JSON file, or of none.

    Raises:
        InputError: Not such a file.
    """
    if path is None:
        return {}
    text = read_text(path)
    try:
        return {int(j): str(name) for j, name in json.loads(text).items()}
    except (ValueError, AttributeError) as e:
        raise InputError(f"names {path} is not a JSON object of latent: name: {e}") from e


def sample_tars(paths: Sequence[str], n: int, seed: int) -> list[str]:
    """Whole tars with at least n samples together, drawn by a hash of seed and name, in the order of the job."""
    chosen, have = set(), 0
    for path in sorted(paths, key=lambda p: (draw(shard_name(p), seed), p)):
        if have < n:
            chosen.add(path)
            have += count_samples(path)
    return [p for p in paths if p in chosen]


def prepare_cross_modal(
    folder: JobFolder, run: Pass, scorer: Scorer, weights: str, names: dict[int, str], processes: Processes
) -> tuple[str, PairWeights]:
    """The folder of cross-modal weights for the scores that need them (else empty), and what to call the latents.

    Args:
        folder: Of the job.
        run: The ``score`` pass that is to follow.
        scorer: A scorer of the same host and SAE that needs no weights.
        weights: A folder that ``mmsae weights`` wrote, or ``auto``.
        names: ``{latent: name}``.
        processes: Who does the pass for the names.
    """
    from mmsae.lvlm.weights.file import CFG, TENSORS, load_weights, tensors_of
    from mmsae.lvlm.weights.job import cross_modal_weights
    from mmsae.options import call

    n, seed, where = folder.job["fit_samples"], run.spec.seed, ""
    paths = sample_tars(run.paths, n, seed)
    if run.spec.score.startswith("cos"):
        where = weights
        if weights == "auto":
            where = str(folder.work / "cross_modal")
            if processes.lead:
                call(
                    cross_modal_weights, host=scorer.host, sae=scorer.sae, shards=paths, out=where, samples=n,
                    batch_size=run.batch_size, workers=run.workers, seed=seed, fault_limit=run.fault_limit,
                    allow_other_site=run.spec.other_site, progress=run.progress, text=run.spec.text,
                )  # fmt: skip
        if processes.lead:
            shutil.copyfile(Path(where) / CFG, folder.draft / CFG)
            shutil.copyfile(tensors_of(where), folder.draft / TENSORS)
        processes.wait()
    fit_run = run._replace(kind="fit", paths=paths, folder=str(folder.work / "fit"))
    sample, faults = FitSample.read(run_pass(fit_run, processes, scorer))
    judged(faults, run.fault_limit)
    found = load_weights(where).weights.nan_to_num(0).clamp(min=0) if where else torch.ones(scorer.sae.d_sae)
    about = {**scorer.fingerprints, "pairs": len(sample.uids), "shards": len(paths), "seed": seed}
    return where, PairWeights(PairScorer(found), name_concepts(sample, names), about)

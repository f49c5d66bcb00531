"""``mmsae filter``: from image-text shards to the shards of the samples worth keeping, with the reasons.

Passes over tars (fitting, target, scoring), one part file a tar; then one process merges them in the order of the tars.
A killed job goes on where it stopped, and its bytes depend neither on kills nor on the number of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmsae.files import atomic_file
from mmsae.sae import SAE
from mmsae.shards import FAULT_LIMIT, expand
from mmsae.tasks import filter_merge as merge
from mmsae.tasks.filter_fit import WEIGHTS, digest, identity, prepare_cross_modal, prepare_weights
from mmsae.tasks.filter_folder import RESULTS, JobFolder
from mmsae.tasks.filter_passes import Target, part_faults
from mmsae.tasks.filter_run import Pass, Processes, judged, run_pass, sole_owner
from mmsae.tasks.filter_select import SMOOTH, Choice, choose_set, quality_bins
from mmsae.tasks.filter_weights import PairWeights
from mmsae.tasks.pair_scorer import (
    ClipScorer,
    PairReader,
    Scorer,
    ScorerSpec,
    check_score,
    host_name,
    make_scorer,
    pairs_up,
)
from mmsae.tasks.selection import Objective, distribution
from mmsae.types import InputError


class Result(NamedTuple):
    """What a report shows of a filter job.

    Attributes:
        folder: Where the result is being put together.
        paths: The input shards.
        scored: All samples.
        kept: ``(N,)`` bool.
        weights: Weights and labels of the latents.
        results: What ``results.json`` will hold.
        caption_field: Field of json with the caption.
    """

    folder: Path
    paths: list[str]
    scored: merge.Scored
    kept: np.ndarray
    weights: PairWeights
    results: dict[str, Any]
    caption_field: str


def filter_shards(
    sae: str,
    shards: str | list[str],
    out: str,
    score: str = "pair_weighted",
    keep: float = 0.5,
    host: str = "",
    weights: str = "auto",
    calibration: str | list[str] | None = None,
    select: Literal["top", "match", "cover"] = "top",
    target: str | list[str] | None = None,
    select_on: Literal["image", "text"] = "image",
    balance: float = 1.0,
    names: str | None = None,
    fit_samples: int = 20_000,
    per_shard: int = 1000,
    compress: bool = False,
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    devices: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    fault_limit: float = FAULT_LIMIT,
    caption_field: str = "",
    allow_other_site: bool = False,
    progress: bool = True,
    present: Callable[[Result], None] | None = None,
) -> Path:
    """Score image-text samples, keep a share of them, and say what is wrong with the others.

    OUT holds scores.parquet (every sample with all scores, whether it is kept, and the concepts that only its text or
    only its image has), uids.npy (DataComp's list of the kept), shards/kept-*.tar (members unchanged), weights.* (what
    was fitted) and results.json. The same command goes on after a kill; run again after it ended, it does nothing.

    Args:
        sae: SAE folder or hub id.
        shards: Path, folder, glob or brace pattern of the tars to filter, or a list of them.
        out: Folder of the result; it appears when everything is done.
        score: What to keep by. CLIP-like hosts: clip, clip_centred, pair_code, pair_weighted, pair_calibrated, random;
            vision-language LLMs: cos_code, cos_algorithm, cos_mean, l0, l1, co_l0, co_l1.
        keep: Share of the usable samples that is kept, above 0 and at most 1.
        host: Name of the host (``local-dir:DIR``, ``ViT-B-32/laion2b_s34b_b79k``, ...). Default: the one that the SAE
            was trained on, where that can be found again.
        weights: File of fitted weights (an earlier OUT/weights.safetensors; for the ``cos`` scores a folder that
            ``mmsae weights`` wrote), or ``auto``: fit them on a sample.
        calibration: Clean shards to fit weights on instead of a sample of the input; needed for pair_calibrated.
        select: ``top``: the highest scores. ``match``: the set whose concepts are distributed as in ``target``.
            ``cover``: the set that covers most concepts.
        target: Shards with the concepts wanted, for ``select: match``.
        select_on: Whose codes are the concepts of a sample, for ``match`` and ``cover``.
        balance: For ``match`` and ``cover``: weight of the concepts; the rest goes to samples in the best third by
            ``score``.
        names: JSON file ``{latent: name}``; other latents are called by the words of their top captions.
        fit_samples: Samples that weights are fitted on, in whole tars drawn by ``seed``.
        per_shard: Samples in a written shard.
        compress: Write ``.tar.gz``.
        batch_size: Samples per forward pass; part of the job, because it changes last bits.
        workers: Decoding processes per device; default: the free cores, 8 at most. 0 decodes in the main process.
        device: ``cpu``, ``cuda`` or ``auto``.
        devices: Number of devices (``cpu``: processes), one host on each.
        precision: ``fp32`` or ``bf16`` autocast of the host.
        seed: Of the sample that weights are fitted on, of the calibrator and of ``random``.
        fault_limit: Largest share of samples that may be unusable.
        caption_field: Field of the samples' json that holds the caption; empty: ``txt``, or json's ``caption``.
        allow_other_site: Accept an SAE that was trained on another host of equal width.
        progress: Whether to print and show bars.
        present: Called with the finished result before it appears, to put a report beside it.

    Returns:
        The folder of the result.

    Raises:
        InputError: An argument, a shard, the SAE or the folder is not usable; one sentence says why.
    """
    _check(score, keep, select, target, calibration, weights, balance, batch_size, devices, per_shard, fit_samples)
    paths = expand(shards)
    model = SAE.from_pretrained(sae)
    spec = ScorerSpec(sae, host, score, "", device, precision, seed, allow_other_site)
    spec = spec._replace(host=host_name(spec, model))
    check_score(score, spec.host)
    given = {
        "calibration": [] if calibration is None else expand(calibration),
        "target": [] if target is None else expand(target),
    }
    # of the scores of a vision-language LLM this one needs no weights, which may have to be fitted first
    worker = PairReader(spec) if pairs_up(spec) else make_scorer(spec._replace(score="l0"))
    job = {
        "score": score,
        "keep": keep,
        **worker.fingerprints,
        "device": worker.device,
        "shards": identity(paths),
        **{k: identity(v) for k, v in given.items()},
        "weights": "auto" if weights == "auto" else digest(weights),
        "names": None if names is None else digest(names),
        **{"select": select, "select_on": select_on, "balance": balance, "fit_samples": fit_samples},
        **{"per_shard": per_shard, "compress": compress, "batch_size": batch_size, "precision": precision},
        **{"seed": seed, "caption_field": caption_field, "allow_other_site": allow_other_site},
    }
    folder = JobFolder(out, job)
    if folder.finished:
        if progress:
            print(f"{out}: finished before; nothing to do")
        return folder.result
    folder.open()
    workers = min(8, max(0, (os.cpu_count() or 1) // devices - 1)) if workers is None else workers
    run = Pass("score", paths, str(folder.work / "score"), spec, "", batch_size, workers, caption_field, fault_limit,
               progress)  # fmt: skip
    run = run._replace(modality=select_on if select != "top" else "")
    with sole_owner(folder.file, [folder.work / k for k in ("fit", "target", "score")]), Processes(devices) as pool:
        try:
            return _filter(folder, run, worker, given, weights, names, pool, present)
        finally:
            folder.discard()


def _check(
    score: str, keep: float, select: str, target: Any, calibration: Any, weights: str, balance: float, *sizes: int
) -> None:
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; it is a share above 0 and at most 1")
    if not 0 <= balance <= 1:
        raise InputError(f"balance is {balance}; it must lie between 0 and 1")
    if (select == "match") != (target is not None):
        raise InputError(f"select is {select} and target is {target}; match needs a target, and only match takes one")
    if score == "pair_calibrated" and calibration is None and weights == "auto":
        raise InputError(
            "pair_calibrated needs clean pairs: name them with --calibration, or give --weights that were fitted so"
        )
    if calibration is not None and weights != "auto":
        raise InputError(f"weights are given ({weights}), so there is nothing to fit on the calibration set")
    for name, size in zip(("batch_size", "devices", "per_shard", "fit_samples"), sizes, strict=True):
        if size < 1:
            raise InputError(f"{name} is {size}; it must be at least 1")


def _filter(
    folder: JobFolder,
    run: Pass,
    worker: PairReader | Scorer,
    given: dict[str, list[str]],
    weights: str,
    names: str | None,
    processes: Processes,
    present: Callable[[Result], None] | None,
) -> Path:
    """The stages of a job whose folder this process owns."""
    draft, spec = folder.draft, run.spec
    draft.mkdir(parents=True, exist_ok=True)
    if isinstance(worker, PairReader):
        fitted = prepare_weights(folder, run, worker, given["calibration"], weights, names, processes)
        run = run._replace(spec=spec._replace(weights=str(draft / WEIGHTS)))
        worker = ClipScorer(run.spec, reader=worker)
    else:
        where, fitted = prepare_cross_modal(folder, run, worker, weights, names, processes)
        run = run._replace(spec=spec._replace(weights=where))
        worker = make_scorer(run.spec) if where else worker
    goal = None
    if given["target"]:
        goal_run = run._replace(kind="target", paths=given["target"], folder=str(folder.work / "target"))
        goal, faults = Target.read(run_pass(goal_run, processes, worker))
        judged(faults, run.fault_limit)
    parts = run_pass(run, processes, worker)
    log = judged([part_faults(p) for p in parts], run.fault_limit)
    scored = merge.read_scored(parts)
    if spec.score not in scored.numbers:
        raise InputError(f"score {spec.score} was not computed; there are {', '.join(scored.numbers)}")
    b = merge.budget(len(scored.uids), folder.job["keep"])
    rows, about = _choose(folder, run, parts, scored, goal, b)
    kept, order = np.zeros(len(scored.uids), dtype=bool), np.full(len(scored.uids), -1)
    kept[rows], order[rows] = True, np.arange(len(rows))
    merge.write_scores(draft / "scores.parquet", parts, scored, kept, order, fitted.label)
    merge.write_uids(draft / "uids.npy", scored.uids[kept].tolist())
    written = merge.reshard(
        run.paths, scored, kept, draft / "shards", folder.job["per_shard"], folder.job["compress"], run.progress
    )
    results = {
        "kept": int(kept.sum()),
        "dropped": int((~kept).sum()),
        "threshold": float(scored.numbers[spec.score][rows].min()),
        "written_shards": written,
        **about,
        "scores": {c: merge.summary(v) for c, v in scored.numbers.items()},
        "scores_kept": {c: merge.summary(v[kept]) for c, v in scored.numbers.items()},
        "spearman": merge.spearman(scored.numbers),
        "weights": fitted.about,
        "faults": log.to_dict(),
        "job": folder.job,
    }
    if present is not None:
        present(Result(draft, run.paths, scored, kept, fitted, results, run.caption_field))
    with atomic_file(draft / RESULTS) as temp:
        temp.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    if run.progress:
        print(log.summary())
        print(f"kept {b} of {len(kept)} samples by {spec.score}, in {written} shards")
    return folder.publish()


def _choose(
    folder: JobFolder, run: Pass, parts: list[Path], scored: merge.Scored, goal: Target | None, b: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The samples to keep, in the order of choice, and how good the set is."""
    score, job = run.spec.score, folder.job
    if job["select"] == "top":
        return merge.best(scored, score, b), {}
    d_sae = SAE.from_pretrained(run.spec.sae).d_sae
    p = np.full(d_sae, 1 / d_sae) if goal is None else distribution(goal.mass[0], SMOOTH)
    choice = Choice(
        run.paths,
        parts,
        scored,
        Objective(p, job["balance"]),
        quality_bins(scored, score),
        fired=goal is None,
        keep=job["keep"],
        seed=job["seed"],
    )
    if goal is not None:
        np.save(folder.draft / "target.npy", p)  # the target decides everything, so it goes with the result
    rows, about = choose_set(choice, goal, b, folder.work / "choose", run.progress)
    return rows, {"selection": about}

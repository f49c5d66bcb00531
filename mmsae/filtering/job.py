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
from mmsae.filtering import choose as merge
from mmsae.filtering.choose import SMOOTH, Choice, choose_set, quality_bins
from mmsae.filtering.fit import WEIGHTS, digest, prepare_cross_modal, prepare_weights, read_names
from mmsae.filtering.pair_weights import PairWeights
from mmsae.filtering.passes import Target, part_faults
from mmsae.filtering.run import Pass, Processes, judged, run_pass
from mmsae.filtering.scorers.clip import ClipScorer, PairReader, Scorer, ScorerSpec, check_score, make_scorer, pairs_up
from mmsae.filtering.selection import Objective, distribution
from mmsae.hosts import named_host
from mmsae.jobs.folder import JOB, JobFolder, begun_job
from mmsae.sae import SAE
from mmsae.shards import FAULT_LIMIT, expand, identity
from mmsae.types import InputError

RESULTS = "results.json"


class Plan(NamedTuple):
    """A job that can be begun: whose folder it is, and what is to be done.

    Attributes:
        folder: Of the job.
        run: The ``score`` pass.
        worker: Host and SAE, loaded.
        given: Shards of the calibration set and of the target.
        weights: ``auto`` or a file.
        names: ``{latent: name}``.
    """

    folder: JobFolder
    run: Pass
    worker: PairReader | Scorer
    given: dict[str, list[str]]
    weights: str
    names: dict[int, str]


def plan_job(
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
    swap: bool = True,
    names: str | None = None,
    fit_samples: int = 20_000,
    per_shard: int = 1000,
    compress: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    devices: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    fault_limit: float = FAULT_LIMIT,
    caption_field: str = "",
    text: Literal["question", "question+answer"] = "question",
    allow_other_site: bool = False,
    progress: bool = True,
) -> Plan:
    """Check what was asked for, load host and SAE, and say what the job is.

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
        swap: For ``match``: make the greedy choice better by swaps that lower the KL to the target.
        names: JSON file ``{latent: name}``; other latents are called by the words of their top captions.
        fit_samples: Samples that weights are fitted on, in whole tars drawn by ``seed``.
        per_shard: Samples in a written shard.
        compress: Write ``.tar.gz``.
        batch_size: Samples per forward pass; part of the job, because it changes last bits. Default: that of the job
            that is begun in ``out``, else 256, and on a CPU as many as have the area of 16 images of 224 pixels.
        workers: Decoding processes per device; default: the free cores, 8 at most. 0 decodes in the main process.
        device: ``cpu``, ``cuda`` or ``auto``.
        devices: Number of devices (``cpu``: processes), one host on each.
        precision: ``fp32`` or ``bf16`` autocast of the host.
        seed: Of the sample that weights are fitted on, of the calibrator and of ``random``.
        fault_limit: Largest share of samples that may be unusable.
        caption_field: Field of the samples' json that holds the caption; empty: ``txt``, or json's ``caption``.
        text: Of vision-language LLMs, which text is scored: ``question``: the prompt alone (json's ``question``, or the
            caption), as published; ``question+answer``: with json's ``answer``.
        allow_other_site: Accept an SAE that was trained on another host of equal width.
        progress: Whether to print and show bars.

    Raises:
        InputError: An argument, a shard, the SAE or the folder is not usable; one sentence says why.
    """
    sizes = (1 if batch_size is None else batch_size, devices, per_shard, fit_samples)
    _check(score, keep, select, target, calibration, weights, balance, *sizes)
    if workers is not None and workers < 0:
        raise InputError(f"workers is {workers}; it must be at least 0")
    if not 0 <= fault_limit <= 1:
        raise InputError(f"fault_limit is {fault_limit}; it is a share between 0 and 1")
    paths = expand(shards)
    model = SAE.from_pretrained(sae)
    spec = ScorerSpec(sae, host, score, "", device, precision, seed, allow_other_site, text)
    spec = spec._replace(host=named_host(spec.host, model.sites, f"SAE {spec.sae}"))
    check_score(score, spec.host)
    if text != "question" and pairs_up(spec):
        raise InputError(f"text is {text}, but host {spec.host} is CLIP-like and reads the caption; leave --text out")
    called = read_names(names)
    given = {
        "calibration": [] if calibration is None else expand(calibration),
        "target": [] if target is None else expand(target),
    }
    # of the scores of a vision-language LLM this one needs no weights, which may have to be fitted first
    worker = PairReader(spec) if pairs_up(spec) else make_scorer(spec._replace(score="l0"))
    begun = begun_job(Path(out) / RESULTS, Path(f"{out}.partial") / JOB)
    batch_size = worker.host.batch_size(begun.get("batch_size") if batch_size is None else batch_size)
    job = {
        "score": score,
        "keep": keep,
        **worker.fingerprints,
        "device": worker.device,
        "shards": identity(paths),
        **{k: identity(v) for k, v in given.items()},
        "weights": "auto" if weights == "auto" else digest(weights),
        "names": None if names is None else digest(names),
        **{"select": select, "select_on": select_on, "balance": balance, "swap": swap, "fit_samples": fit_samples},
        **{"per_shard": per_shard, "compress": compress, "batch_size": batch_size, "precision": precision},
        **{"seed": seed, "caption_field": caption_field, "text": text, "allow_other_site": allow_other_site},
    }
    folder = JobFolder(out, job, "mmsae filter", result=RESULTS, beside=True)
    workers = min(8, max(0, (os.cpu_count() or 1) // devices - 1)) if workers is None else workers
    run = Pass("score", paths, str(folder.work / "score"), spec, "", batch_size, workers, caption_field, fault_limit,
               progress)  # fmt: skip
    return Plan(folder, run._replace(modality=select_on if select != "top" else ""), worker, given, weights, called)


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


class Ready(NamedTuple):
    """Everything that the ``score`` pass needs: it, what computes, what was fitted, and the target's concepts."""

    run: Pass
    worker: Scorer
    fitted: PairWeights
    goal: Target | None


def filter_shards(
    sae: str,
    shards: str | list[str],
    out: str,
    devices: int = 1,
    progress: bool = True,
    present: Callable[[Result], None] | None = None,
    **options: Any,
) -> Path:
    """Score image-text samples, keep a share of them, and say what is wrong with the others.

    OUT holds scores.parquet (every sample with all scores, whether it is kept, and the concepts that only its text or
    only its image has), uids.npy (DataComp's list of the kept), shards/kept-*.tar (members unchanged), weights.* (what
    was fitted) and results.json. The same command goes on after a kill; run again after it ended, it does nothing.

    Args:
        sae: SAE folder or hub id.
        shards: Path, folder, glob or brace pattern of the tars to filter, or a list of them.
        out: Folder of the result; it appears when everything is done.
        devices: Number of devices (``cpu``: processes), one host on each.
        progress: Whether to print and show bars.
        present: Called with the finished result before it appears, to put a report beside it.
        **options: The other arguments of :func:`plan_job`.

    Returns:
        The folder of the result.

    Raises:
        InputError: An argument, a shard, the SAE or the folder is not usable; one sentence says why.
    """
    plan = plan_job(sae, shards, out, devices=devices, progress=progress, **options)
    folder = plan.folder
    if folder.finished:
        if progress:
            print(f"{out}: finished before; nothing to do")
        return folder.out
    with folder.lead(), Processes(devices) as processes:
        ready = prepare(plan, processes)
        return finish(plan, ready, run_pass(ready.run, processes, ready.worker), present)


def prepare(plan: Plan, processes: Processes) -> Ready:
    """What comes before scoring, in all processes of a job: fitting, and the target's concepts."""
    folder, run, worker = plan.folder, plan.run, plan.worker
    folder.draft.mkdir(parents=True, exist_ok=True)
    if isinstance(worker, PairReader):
        fitted = prepare_weights(folder, run, worker, plan.given["calibration"], plan.weights, plan.names, processes)
        run = run._replace(spec=run.spec._replace(weights=str(folder.draft / WEIGHTS)))
        worker = ClipScorer(run.spec, reader=worker)
    else:
        where, fitted = prepare_cross_modal(folder, run, worker, plan.weights, plan.names, processes)
        run = run._replace(spec=run.spec._replace(weights=where))
        worker = make_scorer(run.spec) if where else worker
    goal = None
    if plan.given["target"]:
        goal_run = run._replace(kind="target", paths=plan.given["target"], folder=str(folder.work / "target"))
        goal, faults = Target.read(run_pass(goal_run, processes, worker))
        judged(faults, run.fault_limit)
    return Ready(run, worker, fitted, goal)


def finish(plan: Plan, ready: Ready, parts: list[Path], present: Callable[[Result], None] | None) -> Path:
    """From the parts of the ``score`` pass to the result; in one process."""
    folder, run, fitted = plan.folder, ready.run, ready.fitted
    draft, spec = folder.draft, run.spec
    log = judged([part_faults(p) for p in parts], run.fault_limit)
    scored = merge.read_scored(parts)
    if spec.score not in scored.numbers:
        raise InputError(f"score {spec.score} was not computed; there are {', '.join(scored.numbers)}")
    b = merge.budget(len(scored.uids), folder.job["keep"])
    rows, about = _choose(folder, run, parts, scored, ready.goal, b)
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
        "spearman": merge.rank_correlations(scored.numbers),
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
        swap=goal is not None and job["swap"],
    )
    if goal is not None:
        np.save(folder.draft / "target.npy", p)  # the target decides everything, so it goes with the result
    rows, about = choose_set(choice, goal, b, folder.work / "choose", run.progress)
    return rows, {"selection": about}

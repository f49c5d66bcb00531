"""``mmsae filter``: from image-text shards to the shards of the samples worth keeping, with the reasons.

Passes over tars (fitting, target, scoring), one part file a tar; then one process merges them in the order of the tars.
A killed job goes on where it stopped, and its bytes depend neither on kills nor on the number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.files import atomic_file
from mmsae.sae import SAE
from mmsae.tasks import filter_merge as merge
from mmsae.tasks.filter_fit import WEIGHTS, prepare_cross_modal, prepare_weights
from mmsae.tasks.filter_folder import RESULTS, JobFolder
from mmsae.tasks.filter_passes import Target, part_faults
from mmsae.tasks.filter_plan import Plan, owner, plan_job
from mmsae.tasks.filter_run import Pass, Processes, judged, run_pass
from mmsae.tasks.filter_select import SMOOTH, Choice, choose_set, quality_bins
from mmsae.tasks.filter_weights import PairWeights
from mmsae.tasks.pair_scorer import ClipScorer, PairReader, Scorer, make_scorer
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
        return folder.result
    with owner(folder), Processes(devices) as processes:
        try:
            ready = prepare(plan, processes)
            return finish(plan, ready, run_pass(ready.run, processes, ready.worker), present)
        finally:
            folder.discard()


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
        swap=goal is not None and job["swap"],
    )
    if goal is not None:
        np.save(folder.draft / "target.npy", p)  # the target decides everything, so it goes with the result
    rows, about = choose_set(choice, goal, b, folder.work / "choose", run.progress)
    return rows, {"selection": about}

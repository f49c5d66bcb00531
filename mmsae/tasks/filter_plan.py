"""What a filter job is: what was asked for is checked, host and SAE are loaded, and its folder is found."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

from mmsae.backbones import named_host
from mmsae.sae import SAE
from mmsae.shards import FAULT_LIMIT, expand, identity
from mmsae.tasks.filter_fit import digest, read_names
from mmsae.tasks.filter_folder import JobFolder
from mmsae.tasks.filter_run import Pass, sole_owner
from mmsae.tasks.pair_scorer import PairReader, Scorer, ScorerSpec, check_score, make_scorer, pairs_up
from mmsae.types import InputError


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
    batch_size = worker.host.batch_size(JobFolder.begun(out).get("batch_size") if batch_size is None else batch_size)
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
    folder = JobFolder(out, job)
    workers = min(8, max(0, (os.cpu_count() or 1) // devices - 1)) if workers is None else workers
    run = Pass("score", paths, str(folder.work / "score"), spec, "", batch_size, workers, caption_field, fault_limit,
               progress)  # fmt: skip
    return Plan(folder, run._replace(modality=select_on if select != "top" else ""), worker, given, weights, called)


def owner(folder: JobFolder) -> AbstractContextManager[None]:
    """Be the one process that leads a job; see :func:`mmsae.tasks.filter_run.sole_owner`."""
    folder.open()
    return sole_owner(folder.file, [folder.work / k for k in ("fit", "target", "score")])


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

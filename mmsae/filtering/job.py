"""The job of ``mmsae filter``: what it is, its passes over tars, and the result.

Passes (fitting, target, scoring) write one part file a tar; then one process merges them in the order of the tars. A
killed job goes on where it stopped, and its bytes depend neither on kills nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mmsae.files import write_json
from mmsae.filtering import choose, merge
from mmsae.filtering.columns import Column, ScoredSamples, Summary, rank_correlations, read_samples
from mmsae.filtering.options import Keeping, Scoring
from mmsae.filtering.pair_weights import FILE, Concept, FitSample, PairWeights, fit_weights, name_concepts, take_old
from mmsae.filtering.passes import Pass, TargetSet, part_faults, sample_tars, without_duplicates
from mmsae.filtering.query import COLUMN, score_samples, usable_query
from mmsae.filtering.reshard import Reshard, in_runs, write_elsewhere
from mmsae.filtering.scorers.base import ANY_HOST, PAIR_SCORES, Scorer, ScorerSpec, check_score
from mmsae.filtering.scorers.clip import ClipScorer, PairReader
from mmsae.filtering.scorers.image import ImageScorer
from mmsae.filtering.selection import Objective, distribution
from mmsae.jobs.duplicates import UidParts
from mmsae.jobs.folder import JOB, JobFolder, begun_job
from mmsae.jobs.processes import Local
from mmsae.jobs.units import Engine
from mmsae.load import named_pair
from mmsae.metrics.concepts.names import names_only, read_names
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.options import SAERun, UniqueData, call
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, UidList, expand, identity, shard_name
from mmsae.shards.uids import taken_already
from mmsae.types import IMAGE, InputError

RESULTS = "results.json"


class FilterJob:
    """A job that can be begun; host and SAE are loaded.

    Arguments are those of :func:`mmsae.filtering.command.filter_command`.

    Attributes:
        folder: Where the job is done.
        worker: What computes; until weights are fitted, a reader of pairs or a scorer that needs none.
        scoring_pass: The pass that everything else prepares.

    Raises:
        InputError: An argument, a shard, the SAE or the folder is not usable; one sentence says why.
    """

    def __init__(
        self,
        sae: str,
        shards: str | list[str],
        out: str | Path,
        host: str = "",
        scoring: Scoring = Scoring(),
        keeping: Keeping = Keeping(),
        run: SAERun = SAERun(),
        data: UniqueData = UniqueData(),
        engine: Engine | None = None,
    ) -> None:
        self.engine = engine = engine or Local()
        _check(scoring, keeping, run, data)
        paths = expand(shards)
        found, host = named_pair(sae, host)
        check_score(scoring.score, host)
        images = tuple(found.modalities) == (IMAGE,) and scoring.score in PAIR_SCORES and not host.startswith("lvlm:")
        scoring = _of_images(scoring, keeping, sae) if images else scoring
        self.scoring, self.keeping, self.duplicates = scoring, keeping, data.duplicates
        spec = ScorerSpec(sae, host, scoring.score, "", run.device, run.precision, scoring.seed, run.allow_other_site,
                          scoring.text, images)  # fmt: skip
        if scoring.text != "question" and spec.pairs:
            raise InputError(
                f"text is {scoring.text}, but host {host} is CLIP-like and reads the caption; leave --text out"
            )
        self.names = read_names(scoring.names, sae_fingerprint(found))
        query, called = keeping.query, names_only(self.names)
        self.query = None if query is None else usable_query(query, sae_fingerprint(found), called, found.d_sae)
        listed = isinstance(keeping.keep, str)
        share = keeping.share if listed else keeping.keep
        self.keep = (1.0 if self.query or listed else 0.5) if share is None else share
        self.clean, self.wanted = ([] if s is None else expand(s) for s in (scoring.calibration, keeping.target))
        self.worker: PairReader | Scorer = PairReader(spec) if spec.pairs else _without_weights(spec)
        begun = begun_job(Path(out) / RESULTS, Path(f"{out}.partial") / JOB)
        asked = begun.get("batch_size") if run.batch_size is None else run.batch_size
        batch_size = self.worker.host.batch_size(asked)
        job = {
            "score": scoring.score,
            "keep": self.keep,
            "query": self.query and str(self.query.query),
            **self.worker.fingerprints,
            "device": self.worker.device,
            "shards": identity(paths),
            "calibration": identity(self.clean),
            "target": identity(self.wanted),
            "weights": "auto" if scoring.weights == "auto" else digest(scoring.weights),
            "names": None if scoring.names is None else digest(scoring.names),
            **{k: getattr(keeping, k) for k in ("select", "select_on", "balance", "swap")},
            "fit_samples": scoring.fit_samples,
            "per_shard": keeping.per_shard,
            "compress": keeping.compress,
            "batch_size": batch_size,
            "precision": run.precision,
            "seed": scoring.seed,
            "caption_field": data.caption_field,
            "text": scoring.text,
            "allow_other_site": run.allow_other_site,
        }
        self.listed = UidList(keeping.keep) if listed else None
        if self.listed is not None:
            job["uids"] = self.listed.hash
            if scoring.score.startswith("cos") and scoring.weights == "auto":
                raise InputError(
                    f"keep is {keeping.keep}, and weights of tokens would be fitted on all samples: give --weights"
                )
        self.folder = JobFolder(out, job, "mmsae filter", result=RESULTS, beside=True)
        self.scoring_pass = Pass(
            "score", paths, str(self.folder.work), spec, keeping.select_on if keeping.select != "top" else "",
            batch_size, engine.decoders(run.workers), data.caption_field, data.fault_limit, run.progress,
            tuple(self.query.query.latents()) if self.query else (), self.listed,
        )  # fmt: skip

    def run(self) -> Path:
        """Do the job, or what is left of it, in each process of the engine; returns the result's folder."""
        folder, out, engine = self.folder, self.folder.out, self.engine
        if folder.finished:
            if engine.lead and self.scoring_pass.progress:
                print(f"{out}: finished before; nothing to do")
            return out
        with folder.under(engine):
            if engine.lead:
                folder.draft.mkdir(parents=True, exist_ok=True)
            engine.wait()  # the folder is there, and the leader's, before any other works
            weights = self._weights()
            goal = self._goal()
            parts = self.scoring_pass.run(engine, self.worker)
            merged: list[_Merged] = []
            engine.merge(lambda: False, lambda: merged.append(self._merge(parts, weights, goal)))
            shards = engine.agree(lambda: merged[0].shards)
            if todo := engine.agree(shards.missing):
                engine.deal(shards.tally, in_runs(todo, engine.size), shards.work, write_elsewhere, shards)
            engine.merge(lambda: False, lambda: self._finish(merged[0], weights))
        return out

    def _fitting(self, paths: list[str]) -> Pass:
        return self.scoring_pass._replace(kind="fit", paths=paths, keep=None if self.clean else self.listed)

    def _weights(self) -> PairWeights:
        """What is fitted before the scoring pass; of images alone nothing is, and latents are called by their names."""
        spec = self.scoring_pass.spec
        if not spec.images:
            return self._pair_weights() if spec.pairs else self._token_weights()
        called = {j: Concept(name, []) for j, name in self.names.items()}
        return PairWeights(PairScorer(torch.ones(self.worker.sae.d_sae)), called, dict(self.worker.fingerprints))

    def _pair_weights(self) -> PairWeights:
        """Weights of pair scores, from a file or fitted; from now on the worker scores by them."""
        scoring, given, engine = self.scoring, self.scoring.weights, self.engine
        file, about = self.folder.draft / FILE, {**self.worker.fingerprints, "sites": _said(self.worker.sites)}
        if engine.lead:
            take_old(file)
        if given != "auto":
            fitted = PairWeights.load(given)
            fitted.check(given, about)
            if scoring.score == "pair_calibrated" and fitted.calibrator is None:
                raise InputError(f"{given} was not fitted on a clean calibration set, so it has no pair_calibrated")
            engine.merge(lambda: True, lambda: fitted.save(file))
            if not engine.lead:  # the draft is the leading process's
                file = Path(given)
        elif not engine.agree(lambda: _fitted(file)):
            listed = None if self.clean else self.listed
            paths = sample_tars(self.clean or self.scoring_pass.paths, scoring.fit_samples, scoring.seed, listed)
            parts = self._fitting(paths).run(engine, self.worker)

            def fit() -> None:
                sample, faults = FitSample.read(parts)
                judged(faults, self.scoring_pass.fault_limit)
                data = hashlib.blake2b(json.dumps(identity(paths)).encode(), digest_size=16).hexdigest()
                said = {"data": data, "shards": len(paths), "clean": bool(self.clean), "seed": scoring.seed}
                fit_weights(
                    sample, about | said, calibrate=bool(self.clean), seed=scoring.seed, names=self.names
                ).save(file)  # fmt: skip
                shutil.rmtree(parts[0].parent, ignore_errors=True)

            engine.merge(lambda: _fitted(file), fit)
        self._score_by(str(file))
        self.worker = ClipScorer(self.worker, str(file))
        return self.worker.weights

    def _token_weights(self) -> PairWeights:
        """Cross-modal weights for the scores of tokens that need them, and what to call the latents."""
        from mmsae.lvlm.weights.file import CFG, TENSORS, load_weights, tensors_of
        from mmsae.lvlm.weights.job import cross_modal_weights

        job, scoring, scorer, where, engine = self.scoring_pass, self.scoring, self.worker, "", self.engine
        paths = sample_tars(job.paths, scoring.fit_samples, scoring.seed, self.listed)
        fit_pass = self._fitting(paths)._replace(spec=job.spec._replace(score="l0"))
        if scoring.score.startswith("cos"):
            where = scoring.weights
            if where == "auto":
                where = str(self.folder.work / "cross_modal")
                call(
                    cross_modal_weights, host=scorer.host, sae=scorer.sae, shards=paths, out=where,
                    samples=scoring.fit_samples, batch_size=job.batch_size, workers=job.workers, seed=scoring.seed,
                    fault_limit=job.fault_limit, allow_other_site=job.spec.other_site, progress=job.progress,
                    text=scoring.text, device=job.spec.device, precision=job.spec.precision, engine=engine,
                    names_of=(job.spec.sae, job.spec.host),
                )  # fmt: skip

            def keep() -> None:
                shutil.copyfile(Path(where) / CFG, self.folder.draft / CFG)
                shutil.copyfile(tensors_of(where), self.folder.draft / TENSORS)

            engine.merge(lambda: True, keep)
        parts, mark = fit_pass.run(engine, scorer), self.folder.work / "fitted"
        engine.merge(mark.exists, mark.touch)  # every process reads the parts, when all are there
        sample, faults = FitSample.read(parts)
        judged(faults, job.fault_limit)
        found = load_weights(where).weights.nan_to_num(0).clamp(min=0) if where else torch.ones(scorer.sae.d_sae)
        about = {**scorer.fingerprints, "pairs": len(sample.uids), "shards": len(paths), "seed": scoring.seed}
        if where:
            from mmsae.filtering.scorers.lvlm import SaeVScorer

            self._score_by(where)
            self.worker = SaeVScorer(self.scoring_pass.spec)
        return PairWeights(PairScorer(found), name_concepts(sample, self.names), about)

    def _score_by(self, weights: str) -> None:
        self.scoring_pass = self.scoring_pass._replace(spec=self.scoring_pass.spec._replace(weights=weights))

    def _goal(self) -> TargetSet | None:
        """The target's concepts, where there is one."""
        if not self.wanted:
            return None
        goal, faults = TargetSet.read(
            self.scoring_pass._replace(kind="target", paths=self.wanted, keep=None).run(self.engine, self.worker)
        )
        judged(faults, self.scoring_pass.fault_limit)
        return goal

    def _merge(self, parts: list[Path], weights: PairWeights, goal: TargetSet | None) -> _Merged:
        """Make tables and lists of the parts of the scoring pass, in one process."""
        job, draft, score, scratch = (
            self.scoring_pass,
            self.folder.draft,
            self.scoring.score,
            self.folder.work / "merge",
        )
        uids = UidParts(parts, [shard_name(p) for p in job.paths], self.folder.work)
        if self.duplicates == "drop":
            uids.drop(lambda i, new, log: without_duplicates(parts[i], new, log))
        elif twice := uids.first():
            raise InputError(taken_already(twice.uid, twice.where, twice.first, twice.key))
        log = judged((part_faults(p) for p in parts), job.fault_limit)
        samples = read_samples(parts, scratch)
        query = None if self.query is None else self._query(parts, samples, scratch)
        if query is not None:
            samples.numbers[COLUMN] = query[1]
        if score not in samples.numbers:
            raise InputError(f"score {score} was not computed; there are {', '.join(samples.numbers)}")
        kept, about = self._choose(parts, samples, goal, query, scratch)
        merge.write_scores(draft / "scores.parquet", parts, samples, kept, weights.label, query)
        merge.write_uids(draft / "uids.npy", samples, kept, scratch)
        shards = Reshard(
            job.paths, parts, np.array(samples.starts), kept.on, scratch / "plan.npy", draft / "shards",
            self.keeping.per_shard, self.keeping.compress, job.progress,
        )  # fmt: skip
        shards.make_plan()
        return _Merged(log, samples, kept, about, shards)

    def _finish(self, merged: _Merged, weights: PairWeights) -> None:
        """Write what is said of the result, which then takes its place."""
        log, samples, kept, about, shards = merged
        job, draft, score = self.scoring_pass, self.folder.draft, self.scoring.score
        of_kept = {c: Summary(v, kept.on).to_dict() for c, v in samples.numbers.items()}
        results = {
            "kept": kept.n,
            "dropped": samples.n - kept.n,
            "threshold": of_kept[score]["min"],
            "written_shards": shards.shards,
            **about,
            "scores": {c: Summary(v).to_dict() for c, v in samples.numbers.items()},
            "scores_kept": of_kept,
            "spearman": rank_correlations(samples),
            "weights": weights.about,
            "faults": log.to_dict(),
            "job": self.folder.job,
        }
        if self.listed is not None:
            found = log.n_seen - log.counts["duplicate"]
            results["uids"] = {"listed": len(self.listed), "not_seen": max(0, len(self.listed) - found)}
        if self.keeping.report:
            from mmsae.filtering.report import FilterResult, write_report

            write_report(FilterResult(draft, job.paths, samples, kept.on, weights, results))
        write_json(draft / RESULTS, results)
        if job.progress:
            print(log.summary())
            if self.listed is not None:
                print(self.listed.said(log.n_seen - log.counts["duplicate"]))
            print(f"kept {kept.n} of {samples.n} samples by {score}, in {shards.shards} shards")
        self.folder.publish()

    def _query(self, parts: list[Path], samples: ScoredSamples, scratch: Path) -> tuple[Column, Column]:
        """Of which samples the query holds, and how well they fit."""
        query, n = self.query.query, samples.n
        choose.check_memory("a query", (40 + 60 * len(query.latents())) * n)
        found = score_samples(query, parts, n)
        if not found.holds.any():
            raise InputError(f"query {query} holds of none of the {n} usable samples")
        holds = Column.write(scratch / "holds", bool, iter([found.holds]))
        return holds, Column.write(scratch / "query", found.score.dtype, iter([found.score]))

    def _choose(
        self,
        parts: list[Path],
        samples: ScoredSamples,
        goal: TargetSet | None,
        query: tuple[Column, Column] | None,
        scratch: Path,
    ) -> tuple[merge.Kept, dict[str, Any]]:
        """The samples to keep, and how good the set is."""
        keeping, score, job = self.keeping, self.scoring.score, self.scoring_pass
        if self.query and query is not None:
            holds = query[0].whole()
            said = {"query": str(self.query.query), "name": self.query.name, "holds": int(holds.sum())}
            n = merge.budget(said["holds"], self.keep)
            return merge.keep_best(samples, score, n, scratch, holds), {"query": said}
        n = merge.budget(samples.n, self.keep)
        if keeping.select == "top":
            return merge.keep_best(samples, score, n, scratch), {}
        choose.check_memory(f"--select {keeping.select}", choose.set_bytes(parts, samples, self.keep))
        d_sae = self.worker.sae.d_sae
        p = np.full(d_sae, 1 / d_sae) if goal is None else distribution(goal.mass[0], choose.SMOOTH)
        if goal is not None:
            np.save(self.folder.draft / "target.npy", p)  # the target decides everything, so it goes with the result
        uids = samples.uid_text()
        choice = choose.SetChoice(
            self.folder.parts(job.paths, "choose"), parts, samples, uids, Objective(p, keeping.balance),
            choose.quality_bins(uids, samples.numbers[score].whole()), fired=goal is None, keep=self.keep,
            seed=self.scoring.seed, swap=goal is not None and keeping.swap,
        )  # fmt: skip
        rows, about = choose.choose_set(choice, goal, n, job.progress)
        return merge.keep_rows(samples, rows, scratch), {"selection": about}


class _Merged(NamedTuple):
    """What the merge of the parts has found."""

    log: FaultLog
    samples: ScoredSamples
    kept: merge.Kept
    about: dict[str, Any]  #: What the results say of the choice.
    shards: Reshard


def _check(scoring: Scoring, keeping: Keeping, run: SAERun, data: UniqueData) -> None:
    """Refuse options that cannot be, or do not go together."""
    listed = isinstance(keeping.keep, str)
    if keeping.share is not None and not listed:
        raise InputError(f"share is {keeping.share}, and keep is {keeping.keep}: share is for a file of uids in keep")
    for name, share in {"keep": None if listed else keeping.keep, "share": keeping.share}.items():
        if share is not None and not 0 < share <= 1:
            raise InputError(f"{name} is {share}; it is a share above 0 and at most 1")
    if not 0 <= keeping.balance <= 1:
        raise InputError(f"balance is {keeping.balance}; it must lie between 0 and 1")
    if (keeping.select == "match") != (keeping.target is not None):
        raise InputError(
            f"select is {keeping.select} and target is {keeping.target}; match needs a target, and only match takes one"
        )
    if keeping.query is not None and keeping.select != "top":
        raise InputError(f"select is {keeping.select}; with a query samples are chosen by score: select must be top")
    if scoring.score == COLUMN and keeping.query is None:
        raise InputError("score is query, and no --query names a file with one")
    if scoring.score == "pair_calibrated" and scoring.calibration is None and scoring.weights == "auto":
        raise InputError(
            "pair_calibrated needs clean pairs: name them with --calibration, or give --weights that were fitted so"
        )
    if scoring.calibration is not None and scoring.weights != "auto":
        raise InputError(f"weights are given ({scoring.weights}), so there is nothing to fit on the calibration set")
    sizes = {"batch_size": run.batch_size, "per_shard": keeping.per_shard}
    for name, n, least in [*((k, v, 1) for k, v in sizes.items()), ("fit_samples", scoring.fit_samples, 1),
                           ("workers", run.workers, 0)]:  # fmt: skip
        if n is not None and n < least:
            raise InputError(f"{name} is {n}; it must be at least {least}")
    if not 0 <= data.fault_limit <= 1:
        raise InputError(f"fault_limit is {data.fault_limit}; it is a share between 0 and 1")


def _of_images(scoring: Scoring, keeping: Keeping, sae: str) -> Scoring:
    """The scoring of samples whose images alone are read: by the query, where no score is chosen.

    Raises:
        InputError: What is asked for is of pairs.
    """
    if keeping.query is not None and scoring.score == Scoring.score:
        scoring = replace(scoring, score=COLUMN)
    if scoring.score not in ANY_HOST:
        raise InputError(f"SAE {sae} has image; pair scores need image and text: choose by --query or --score random")
    if scoring.calibration is not None or scoring.weights != "auto" or keeping.select_on != "image":
        raise InputError(f"SAE {sae} has image; calibration, weights and select_on text are of pairs: leave them out")
    return scoring


def _without_weights(spec: ScorerSpec) -> Scorer:
    """A scorer of images alone, or one of tokens before there are weights: of their scores this one needs none."""
    if spec.images:
        return ImageScorer(spec)
    from mmsae.filtering.scorers.lvlm import SaeVScorer

    return SaeVScorer(spec._replace(score="l0"))


def _fitted(file: Path) -> bool:
    return file.exists() and file.with_suffix(".json").exists()


def _said(sites: dict[str, Any]) -> dict[str, str]:
    return {m: f"{s.module}:{s.io}[{s.tokens}]" for m, s in sorted(sites.items())}


def digest(path: str) -> str:
    """Hash of a small file, or of the cross-modal weights in a folder."""
    from mmsae.lvlm.weights.file import tensors_of

    file = tensors_of(path) if Path(path).is_dir() else Path(path)
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e


def judged(faults: Iterable[dict[str, Any]], limit: float) -> FaultLog:
    """The faults of all parts together.

    Raises:
        InputError: Their share is above the limit.
    """
    log = FaultLog()
    for saved in faults:
        log.merge(FaultLog.from_dict(saved).take())
    log.check(limit, final=True)
    return log

"""``mmsae bench filter``: a base model is fine-tuned on halves of an alignment set of which a known share is damaged.

SAE-V says that less than half of an alignment set, chosen by cross-modal SAE features, gives more than 110% of the
result of all of it. Every stage writes its result whole or not at all and is skipped when it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.bench.filter.arms import ARMS, LIKELIHOOD, PAPER, SAE_V
from mmsae.bench.llava import MODEL_SEED, WORLD_SEED, base_model
from mmsae.bench.stages import stages_of
from mmsae.files import write_json
from mmsae.jobs.stages import Stages

SEEDS = {"alignment": 5, "exam": 9}


class FilterSizes(NamedTuple):
    """How much of everything."""

    scenes: int = 6000  #: Clean scenes for CLIP, base model and the pairs of the CLIP-level SAE
    clip_steps: int = 300  #: Steps of the CLIP
    base_steps: int = 150  #: Steps of the base model
    samples: int = 4000  #: Size of the alignment set
    sae_steps: int = 400  #: Steps of each SAE
    d_sae: int = 512  #: Latents of the SAE on tokens
    k: int = 16  #: Latents that a token has
    steps: int = 60  #: Steps of every fine-tuning
    batch_size: int = 48  #: Dialogues a step
    exam: int = 500  #: Held-out scenes; four questions each


def bench_filter(
    root: Path,
    sizes: FilterSizes = FilterSizes(),
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    damage: float = 0.4,
    clip: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The benchmark ``filter`` at any size; a folder may be gone on with by more arms and more seeds."""
    from mmsae.bench.filter.report import filter_table, write_filter_report
    from mmsae.bench.filter.world import Classroom, alignment_set
    from mmsae.hosts import load_host

    stages = stages_of(root, {"bench": "filter", "damage": damage, "clip": clip, **sizes._asdict()}, progress)
    if progress:
        print(
            f"mmsae bench filter: {len(arms)} arms, {len(seeds)} seeds, {sizes.samples} samples, {damage:.0%} of them"
            f" damaged. About {1.5 + 10 * len(arms) * len(seeds) / 60:.0f} minutes of one core; {root}",
            flush=True,
        )
    clip, base = base_model(stages, sizes.scenes, sizes.clip_steps, sizes.base_steps, clip, progress)
    data = alignment_set(sizes.samples, SEEDS["alignment"], damage)
    stages.run("stages/alignment", lambda: data.write(root / "shards" / "alignment"))
    host = load_host(f"lvlm:{base}")
    room = Classroom(host.model, host.processor, data)
    scores, about = _scores(stages, sizes, data, room, base, clip)
    exam = room.exam(sizes.exam, SEEDS["exam"])
    for seed in seeds:  # all arms of a seed before the next, so that an interrupted run can be compared
        for arm in arms:
            _arm(stages, arm, seed, sizes, scores, room, exam)
    results: dict[str, Any] = {
        "base": stages.run("stages/base_grade", lambda: room.grade(room.model, exam)),
        "arms": {a: [_arm(stages, a, s, sizes, scores, room, exam) for s in seeds] for a in arms},
        "detection": _detection(scores, data),
        "sae": about,
    }
    results["summary"] = _summary(results["arms"], results["base"])
    results |= {"paper": PAPER, "damage": damage, "seeds": list(seeds), "sizes": sizes._asdict()}
    done = [*stages.all_done("stages/*"), *stages.all_done("arms/*")]
    results |= {"cpu_seconds": sum(stages.read(name)["seconds"] for name in done)}
    write_json(root / "results.json", results)
    table = filter_table(results)
    (root / "table.md").write_text(table)
    report = write_filter_report(root, results)
    if progress:
        print(f"\n{table}\nfigures: {root / 'results.json'}, {root / 'accuracy.png'}")
    return {**results, "out": str(report)}


def _scores(
    stages: Stages, sizes: FilterSizes, data: Any, room: Any, base: str, clip: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every score of every sample, and what the SAE on tokens is like."""
    from mmsae.bench.filter.scores import READS, pair_scores, token_scores, train_token_sae

    root, seed = stages.folder.out, MODEL_SEED
    about = stages.run(
        "stages/sae", lambda: train_token_sae(base, data, root / "sae", sizes.sae_steps, sizes.d_sae, sizes.k, seed)
    )

    def listed(found: dict[str, np.ndarray]) -> dict[str, list[float]]:
        return {name: v.tolist() for name, v in found.items()}

    def tokens(i: int) -> dict[str, list[float]]:
        weights = root / f"weights-{i}"
        return listed(token_scores(base, root / "sae", root / "shards" / "alignment", data, READS[i], weights))

    read, blind = (
        stages.run(f"stages/scores_{name}", lambda i=i: tokens(i)) for i, name in enumerate(("answer", "question"))
    )
    pair = stages.run(
        "stages/scores_pair",
        lambda: listed(pair_scores(clip, data, sizes.scenes, WORLD_SEED, root / "pair_sae", sizes.sae_steps)),
    )
    likelihood = stages.run("stages/scores_likelihood", lambda: room.answer_scores().tolist())
    found = {**read, **{f"{s}/question": blind[s] for s in SAE_V}, **pair, LIKELIHOOD: likelihood}
    found |= {"oracle": data.clean.astype(float), "random": np.random.default_rng([seed, 43]).random(len(data.uids))}
    return {name: np.asarray(v, float) for name, v in found.items()}, about


def _arm(
    stages: Stages, arm: str, seed: int, sizes: FilterSizes, scores: dict[str, np.ndarray], room: Any, exam: Any
) -> dict[str, Any]:
    """Fine-tune on what an arm keeps, and grade it."""
    from mmsae.bench.filter.world import top_half
    from mmsae.world.models.llava.train import LlavaTraining

    def work() -> dict[str, Any]:
        data = room.data
        rows = np.arange(len(data.uids))
        if arm != "all":
            score = np.zeros(len(rows)) if arm == "random" else scores[arm]  # all equal: the tie-break is random
            rows = top_half(score, data.is_caption, seed)
        recipe = LlavaTraining(sizes.steps, sizes.batch_size, seed, lr=0.01, adam_lr=1e-3)
        grade = room.grade(room.fine_tune(rows, recipe), exam)
        return {**grade, "kept": len(rows), "damaged": float((~data.clean[rows]).mean())}

    return stages.run(f"arms/{arm.replace('/', '-')}-{seed}", work)


def _detection(scores: dict[str, np.ndarray], data: Any) -> dict[str, dict[str, float]]:
    """AUROC of finding each kind of damage among the samples of its task, and Spearman among captions."""
    import torch

    from mmsae.bench.filter.world import KINDS
    from mmsae.metrics.statistics import auroc, spearman

    out: dict[str, dict[str, float]] = {}
    captions = data.is_caption
    for name, s in scores.items():
        if name == "n_text":
            continue
        row = {}
        for kind in KINDS:
            clean = data.clean & (captions == (kind != "answer"))
            row[kind] = auroc(torch.tensor(s[clean]), torch.tensor(s[data.kind == kind]))
        of = lambda n: torch.tensor(scores[n][captions])  # noqa: E731
        row |= {f"spearman_{n}": spearman(of(name), of(n)).item() for n in ("n_text", "l0", "co_l0")}
        out[name] = row
    return out


def _summary(arms: dict[str, list[dict[str, Any]]], base: dict[str, float]) -> dict[str, Any]:
    """Mean and deviation over seeds, the result relative to all data, and whether the claim holds.

    ``ratio`` is accuracy over that of ``all``; ``ratio_above_chance`` takes the chance level .5 off both first, the
    figure for a measure in which guessing does not give 0.
    """
    full = np.mean([r["accuracy"] for r in arms["all"]])
    out = {}
    for arm, runs in arms.items():
        row: dict[str, Any] = {}
        for key in ("accuracy", "random", "adversarial", "caption_loss", "damaged"):
            values = [r[key] for r in runs]
            row[key] = float(np.mean(values))
            row[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        row["ratio"] = float(row["accuracy"] / full)
        row["ratio_above_chance"] = float((row["accuracy"] - 0.5) / (full - 0.5)) if full > 0.5 else None
        row["gain"] = float(row["accuracy"] - base["accuracy"])
        row["claim"] = bool(row["ratio"] > PAPER["result"])
        out[arm] = row
    return out

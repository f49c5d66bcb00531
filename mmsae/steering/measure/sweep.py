"""Many interventions on the same prompts and noise, and one tidy table of what each did to each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mmsae.jobs.estimate import progress_bar
from mmsae.metrics.statistics import interval
from mmsae.steering.edits.attach import attach
from mmsae.steering.measure.images import dose_response, specificity
from mmsae.steering.measure.scorers import Metric, moved
from mmsae.types import InputError

if TYPE_CHECKING:
    import pandas as pd

#: What ``attach`` takes, or a function of a batch's prompts and seeds that opens a context with the host steered.
Steering = Mapping[Any, Any] | Sequence[Any] | Callable[[Sequence[str], Sequence[int]], AbstractContextManager[Any]]
UNSTEERED = "none"
#: Between the noises of neighbouring prompts; more than the seeds that anybody asks for are apart
STRIDE = 1_000_003
COLUMNS = ("intervention", "control", "strength", "prompt", "seed", "metric", "value", "relative", "share")


class Condition(NamedTuple):
    """What images are drawn under."""

    name: str
    strength: float  #: Its strength; 0 without steering.
    steering: Steering  #: How the host is steered.
    control: int = -1  #: Number of the random control, -1 for the intervention itself.


class Item(NamedTuple):
    """One image of a sweep; ``seed`` is that of its noise, see :func:`noise`."""

    prompt: str
    seed: int


#: ``{(name, strength, control): {item: image (3, H, W)}}``
Images = dict[tuple[str, float, int], dict[Item, Tensor]]
#: Called with every condition and batch: ``watch(condition, items, images (B, 3, H, W))``.
Watch = Callable[[Condition, Sequence[Item], Tensor], None]


def noise(seed: int, number: int) -> int:
    """Seed of the noise of prompt ``number`` (from 0, which keeps ``seed``).

    Prompts that share their noise give images that resemble each other, which intervals over prompts take for
    independent; so every prompt has noise of its own. What is compared, before and after, has the same.
    """
    return seed + STRIDE * number


def plan(prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> list[list[Item]]:
    """Batches of all prompts with all seeds; every condition has the same ones."""
    items = [Item(p, noise(s, i)) for (i, p), s in product(enumerate(prompts), seeds)]
    return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]


def doses(name: str, strengths: Sequence[float], steering: Callable[[float], Steering]) -> list[Condition]:
    """One intervention at several strengths, ``steering(strength)`` each.

    Raises:
        InputError: A strength twice, or 0, which is the unsteered image that every sweep has.
    """
    if len(set(strengths)) != len(strengths) or 0 in strengths:
        raise InputError(f"strengths {list(strengths)} must be different and not 0.")
    return [Condition(name, float(s), steering(s)) for s in strengths]


def run_batch(
    host: Any,
    items: Sequence[Item],
    conditions: Sequence[Condition],
    metrics: Mapping[str, Metric],
    watch: Watch | None = None,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> pd.DataFrame:
    """The rows of one batch: unsteered, and under every condition, with the same prompts, noise and schedule.

    Returns a table with :data:`COLUMNS`; ``relative`` and ``share`` are means over the batch, NaN where the steering
    keeps no log. ``tick`` is called after every generation, ``watch`` is shown all images.
    """
    import pandas as pd

    prompts, seeds = map(list, zip(*items, strict=True))
    metrics = {"moved": moved, **metrics}
    before, rows = None, []
    for condition in (Condition(UNSTEERED, 0.0, lambda p, s: nullcontext()), *conditions):
        how = condition.steering
        context = how(prompts, seeds) if callable(how) else attach(host, how)
        with context as log:
            after = host.generate(prompts, seed=seeds, **{"batch_size": len(items), **options})
        before = after if before is None else before
        if watch is not None:
            watch(condition, items, after)
        touched = (0.0, 0.0) if before is after else tuple(getattr(log, f, float("nan")) for f in COLUMNS[-2:])
        key = (condition.name, condition.control, condition.strength)
        for name, metric in metrics.items():
            values = metric(before, after, prompts).double().cpu().tolist()
            rows += [(*key, *i, name, v, *touched) for i, v in zip(items, values, strict=True)]
        tick()
    return pd.DataFrame(rows, columns=list(COLUMNS))


def sweep(
    host: Any,
    prompts: Sequence[str],
    conditions: Sequence[Condition],
    metrics: Mapping[str, Metric] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 16,
    progress: bool = False,
    watch: Watch | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Steer and measure.

    Args:
        host: Diffusion host.
        prompts: Every one is drawn with as many noises as there are seeds.
        conditions: Those of :func:`doses` (and :func:`~mmsae.steering.measure.controls.controls` for their controls).
        metrics: ``{name: metric(before, after, prompts)}``, see :mod:`mmsae.steering.measure.scorers`.
        seeds: Seeds of the noise of the first prompt; others have their own (:func:`noise`), which the table names.
        batch_size: Images at a time.
        progress: Whether to show a bar.
        watch: Function that is shown all images: ``watch(condition, items, images)``.
        **options: Options of ``host.generate``: ``steps``, ``guidance``, ``negative``, ...

    Returns:
        One row per condition (and ``none``, the unsteered images), prompt, seed and metric, columns :data:`COLUMNS`.

    Raises:
        InputError: No prompts or seeds, or two conditions of the same name, strength and control.
    """
    import pandas as pd

    batches = check(prompts, seeds, conditions, batch_size)
    with progress_bar("steering", "batch", progress, len(batches) * (len(conditions) + 1)) as bar:
        parts = [run_batch(host, b, conditions, metrics or {}, watch, bar.update, **options) for b in batches]
    return pd.concat(parts, ignore_index=True)


def check(
    prompts: Sequence[str], seeds: Sequence[int], conditions: Sequence[Condition], batch_size: int
) -> list[list[Item]]:
    """The batches of a sweep, where there is something to draw and nothing twice."""
    if not prompts or not seeds or len(set(seeds)) != len(seeds) or len(set(prompts)) != len(prompts):
        raise InputError(f"a sweep needs different prompts and different seeds, not {len(prompts)} and {list(seeds)}.")
    names = [(a.name, a.strength, a.control) for a in conditions]
    if twice := {n for n in names if names.count(n) > 1}:
        raise InputError(f"a sweep has intervention {next(iter(twice))} twice.")
    return plan(prompts, seeds, batch_size)


def rows_of(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric, which the table must have."""
    own = table[table.metric == metric]
    if not len(own):
        raise InputError(f"the table has no metric {metric!r}: it has {', '.join(table.metric.unique())}.")
    return own


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over images with intervals over prompts, by intervention, strength and metric; controls are pooled.

    Returns:
        Columns ``intervention, control (bool), strength, metric, mean, low, high, n, relative, share``.
    """
    import pandas as pd

    keys = ["intervention", "control", "strength", "metric"]
    rows = []
    for key, own in table.assign(control=table.control >= 0).groupby(keys, sort=False):
        i = interval(own.value.to_numpy(), own.prompt.to_numpy())
        rows.append((*key, i.mean, i.low, i.high, i.n, own.relative.mean(), own.share.mean()))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "n", "relative", "share"])


def verdicts(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Dose response, and effect beside random features at the same strength, of every intervention.

    Returns:
        One row per intervention and strength: ``rho`` over strengths (unsteered included), ``effect`` and ``control``
        (means), ``size``, ``win_rate``, ``beaten``, ``controls``; the last five are NaN without controls.
    """
    import pandas as pd

    own = rows_of(table, metric)
    base, rows = own[own.intervention == UNSTEERED], []
    for name in [n for n in own.intervention.unique() if n != UNSTEERED]:
        mine = own[(own.intervention == name) & (own.control < 0)]
        curve = pd.concat([base, mine])
        rho = dose_response(curve.strength.tolist(), curve.value.tolist()).rho
        for s, at in mine.groupby("strength"):
            pool = own[(own.intervention == name) & (own.control >= 0) & (own.strength == s)]
            wide = pool.pivot(index="control", columns=["prompt", "seed"], values="value")
            order = pd.MultiIndex.from_frame(at[["prompt", "seed"]])
            if len(wide) > 1:
                found = specificity(at.value.tolist(), wide[order].to_numpy().tolist())
            else:
                nan = float("nan")
                found = (at.value.mean(), nan, nan, nan, nan, len(wide))
            rows.append((name, s, rho, *found))
    columns = ["intervention", "strength", "rho", "effect", "control", "size", "win_rate", "beaten", "controls"]
    return pd.DataFrame(rows, columns=columns)


def collect(wanted: Sequence[Item], into: Images) -> Watch:
    """A ``watch`` that keeps the images of some items, on the CPU."""
    keep = set(wanted)

    def watch(condition: Condition, items: Sequence[Item], images: Tensor) -> None:
        key = (condition.name, condition.strength, condition.control)
        for item, image in zip(items, images, strict=True):
            if item in keep:
                into.setdefault(key, {})[item] = image.detach().cpu()

    return watch

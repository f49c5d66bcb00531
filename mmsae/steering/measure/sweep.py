"""Many interventions on the same prompts and noise, and one tidy table of what each did to each picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mmsae.metrics.statistics import interval
from mmsae.steering.edits.attach import attach
from mmsae.steering.measure.pictures import dose_response, specificity
from mmsae.steering.measure.scorers import Metric, moved
from mmsae.types import InputError

if TYPE_CHECKING:
    import pandas as pd

#: What ``attach`` takes, or a function of a batch's prompts and seeds that opens a context with the host steered.
Way = Mapping[Any, Any] | Sequence[Any] | Callable[[Sequence[str], Sequence[int]], AbstractContextManager[Any]]
UNSTEERED = "none"
#: Between the noises of neighbouring prompts; more than the seeds that anybody asks for are apart
STRIDE = 1_000_003
COLUMNS = ("intervention", "control", "strength", "prompt", "seed", "metric", "value", "relative", "share")


class Arm(NamedTuple):
    """One way of generating.

    Attributes:
        name: Of the intervention.
        strength: At which; 0 without steering.
        way: How the host is steered.
        control: Number of the random control, -1 for the intervention itself.
    """

    name: str
    strength: float
    way: Way
    control: int = -1


class Item(NamedTuple):
    """One picture of a sweep; ``seed`` is that of its noise, see :func:`noise`."""

    prompt: str
    seed: int


#: Called with every arm and batch: ``seen(arm, items, pictures (B, 3, H, W))``.
Seen = Callable[[Arm, Sequence[Item], Tensor], None]


def noise(seed: int, number: int) -> int:
    """Seed of the noise of prompt ``number`` (from 0, which keeps ``seed``).

    Prompts that share their noise give pictures that resemble each other, which intervals over prompts take for
    independent; so every prompt has noise of its own. What is compared, before and after, has the same.
    """
    return seed + STRIDE * number


def plan(prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> list[list[Item]]:
    """Batches of all prompts with all seeds; every arm sees the same ones."""
    items = [Item(p, noise(s, i)) for (i, p), s in product(enumerate(prompts), seeds)]
    return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]


def doses(name: str, strengths: Sequence[float], way: Callable[[float], Way], control: int = -1) -> list[Arm]:
    """The arms of one intervention at several strengths, ``way(strength)`` each.

    Raises:
        InputError: A strength twice, or 0, which is the unsteered picture that every sweep has.
    """
    if len(set(strengths)) != len(strengths) or 0 in strengths:
        raise InputError(f"strengths {list(strengths)} must be different and not 0.")
    return [Arm(name, float(s), way(s), control) for s in strengths]


def run_batch(
    host: Any,
    items: Sequence[Item],
    arms: Sequence[Arm],
    metrics: Mapping[str, Metric],
    seen: Seen | None = None,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> pd.DataFrame:
    """The rows of one batch: unsteered, and under every arm, with the same prompts, noise and schedule.

    Args:
        host: With ``generate``.
        items: The batch.
        arms: Ways of steering.
        metrics: ``{name: metric}``; ``moved`` is always there.
        seen: Is shown all pictures.
        tick: Called after every generation.
        **options: Of ``host.generate``.

    Returns:
        A table with :data:`COLUMNS`; ``relative`` and ``share`` are means over the batch, NaN where the way of
        steering keeps no log.
    """
    import pandas as pd

    prompts, seeds = map(list, zip(*items, strict=True))
    metrics = {"moved": moved, **metrics}
    before, rows = None, []
    for arm in (Arm(UNSTEERED, 0.0, lambda p, s: nullcontext()), *arms):
        context = arm.way(prompts, seeds) if callable(arm.way) else attach(host, arm.way)
        with context as log:
            after = host.generate(prompts, seed=seeds, **{"batch_size": len(items), **options})
        before = after if before is None else before
        if seen is not None:
            seen(arm, items, after)
        touched = (0.0, 0.0) if before is after else tuple(getattr(log, f, float("nan")) for f in COLUMNS[-2:])
        for name, metric in metrics.items():
            values = metric(before, after, prompts).double().cpu().tolist()
            rows += [
                (*arm[:1], arm.control, arm.strength, *i, name, v, *touched) for i, v in zip(items, values, strict=True)
            ]
        tick()
    return pd.DataFrame(rows, columns=list(COLUMNS))


def sweep(
    host: Any,
    prompts: Sequence[str],
    arms: Sequence[Arm],
    metrics: Mapping[str, Metric] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 16,
    progress: bool = False,
    seen: Seen | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Steer and measure.

    Args:
        host: Diffusion host.
        prompts: Every one is drawn with as many noises as there are seeds.
        arms: From :func:`doses` (and :func:`~mmsae.steering.measure.controls.controls` for their controls).
        metrics: ``{name: metric(before, after, prompts)}``, see :mod:`mmsae.steering.measure.scorers`.
        seeds: Of the noise of the first prompt; others have their own (:func:`noise`), which the table names.
        batch_size: Pictures at a time.
        progress: Show a bar.
        seen: Is shown all pictures: ``seen(arm, items, pictures)``.
        **options: Of ``host.generate``: ``steps``, ``guidance``, ``negative``, ...

    Returns:
        One row per arm (and ``none``, the unsteered pictures), prompt, seed and metric, columns :data:`COLUMNS`.

    Raises:
        InputError: No prompts or seeds, or two arms of the same name, strength and control.
    """
    import pandas as pd
    from tqdm import tqdm

    batches = check(prompts, seeds, arms, batch_size)
    with tqdm(total=len(batches) * (len(arms) + 1), disable=not progress, unit="batch", desc="steering") as bar:
        parts = [run_batch(host, b, arms, metrics or {}, seen, bar.update, **options) for b in batches]
    return pd.concat(parts, ignore_index=True)


def check(prompts: Sequence[str], seeds: Sequence[int], arms: Sequence[Arm], batch_size: int) -> list[list[Item]]:
    """The batches of a sweep, or an :class:`InputError`."""
    if not prompts or not seeds or len(set(seeds)) != len(seeds) or len(set(prompts)) != len(prompts):
        raise InputError(f"a sweep needs different prompts and different seeds, not {len(prompts)} and {list(seeds)}.")
    names = [(a.name, a.strength, a.control) for a in arms]
    if twice := {n for n in names if names.count(n) > 1}:
        raise InputError(f"a sweep has intervention {next(iter(twice))} twice.")
    return plan(prompts, seeds, batch_size)


def rows_of(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric.

    Raises:
        InputError: The table has no such metric.
    """
    own = table[table.metric == metric]
    if not len(own):
        raise InputError(f"the table has no metric {metric!r}: it has {', '.join(table.metric.unique())}.")
    return own


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over pictures with intervals over prompts, by intervention, strength and metric; controls are pooled.

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


def collect(wanted: Sequence[Item], into: dict[tuple[str, float, int], dict[Item, Tensor]]) -> Seen:
    """A ``seen`` that keeps the pictures of some items: ``into[name, strength, control][item]``, on the CPU."""
    keep = set(wanted)

    def seen(arm: Arm, items: Sequence[Item], pictures: Tensor) -> None:
        for item, picture in zip(items, pictures, strict=True):
            if item in keep:
                into.setdefault((arm.name, arm.strength, arm.control), {})[item] = picture.detach().cpu()

    return seen

"""What a run was asked for, kept in its checkpoints: options and checkpoint that disagree are not settled silently.

One rule: whatever a result depends on must be what the checkpoint was made with, else the run is refused. The length of
the training alone may change; the new one holds, for schedules and ramps too, and is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmsae.sae.registry import composition
from mmsae.types import InputError

_PLAIN = (bool, int, float, str, type(None))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Public entries that are options: numbers, words, and lists and mappings of such."""

    def is_plain(v: Any) -> bool:
        if isinstance(v, Mapping):
            return all(map(is_plain, v.values()))
        return isinstance(v, _PLAIN) or (isinstance(v, (list, tuple)) and all(map(is_plain, v)))

    return {k: v for k, v in values.items() if not k.startswith("_") and is_plain(v)}


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}.{key}" if before else str(key)
        out |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return out


def _term(term: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in _plain(vars(term)).items() if k not in ("name", "training")}


def recipe(module: Any) -> dict[str, Any]:
    """``{dotted name: value}`` of a LitSAE that has its trainer: parts, losses, optimiser, schedule, precision.

    Optimiser and schedule are asked by making one of each: only they know their defaults.
    """
    weights = list(module.sae.parameters())
    optimizer = module.make_optimizer(weights) if weights else None
    found: dict[str, Any] = {
        "sae": composition(module.sae),
        "losses": {
            "terms": [term.name for term in module.losses],
            **{f"{i}.{term.name}": _term(term) for i, term in enumerate(module.losses)},
        },
        "optimizer": {"name": None},
        "scheduler": {"name": None},
    }
    if optimizer is not None:
        found["optimizer"] = {"name": type(optimizer).__name__, **_plain(optimizer.param_groups[0])}
    if optimizer is not None and module.make_scheduler is not None:
        scheduler = module.make_scheduler(optimizer)
        options = {k: v for k, v in _plain(vars(scheduler)).items() if k not in ("base_lrs", "last_epoch")}
        found["scheduler"] = {"name": type(scheduler).__name__, **options}
    trainer = module.trainer
    found["trainer"] = {
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or "norm"),
    }
    names = ("dead_after", "normaliser_rows", "seed")
    return _flat(found | {name: getattr(module, name) for name in names} | {"freeze": module.kept.what or "nothing"})


def check(saved: Mapping[str, Any], own: Mapping[str, Any], fitting: bool) -> None:
    """Compare the :func:`recipe` that a checkpoint was made with and that of this run.

    What only one of the two has (another version's) is not compared; where training does not go on, the parts of the
    SAE alone matter.

    Raises:
        InputError: They disagree.
    """
    both = [k for k in own if k in saved and (fitting or k.startswith("sae."))]
    odd = [k for k in both if _listed(own[k]) != _listed(saved[k])]
    if odd:
        named = "; ".join(f"{k} is {saved[k]} in the checkpoint, {own[k]} in this run" for k in odd[:4])
        what = "resuming would not continue the same run" if fitting else "it is another model"
        more = f" (and {len(odd) - 4} more)" if len(odd) > 4 else ""
        raise InputError(f"{named}{more}: {what}; give the checkpoint's value, or no --ckpt_path")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""Which SAEs a run trains: options of each, beside those of the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mmsae.errors import InputError
from mmsae.training.members.sites import plain, site_word

SHORT = {
    "k": "model.sae.init_args.selector.init_args.k",
    "ratio": "model.sae.init_args.ratio",
    "d_sae": "model.sae.init_args.d_sae",
    "lr": "model.optimizer.init_args.lr",
    "freeze": "model.freeze",
    "seed": "seed_everything",
    "sites": "data.sites",
}  #: Short names of what often differs.
_EITHER = {"ratio": "d_sae", "d_sae": "ratio"}  # one of the two is given


@dataclass(frozen=True)
class Members:
    """Several SAEs on the same batches, each as a run of its own would train it; their folders are RUN/NAME."""

    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``{name: {option: value}}``: what a run of that member alone would be given beside the recipe, as
    ``{wide: {ratio: 16}, control: {model.freeze: decoder}}``. Options are those of ``model``, ``seed_everything`` and
    ``data.sites``, dotted or nested; ``k``, ``ratio``, ``d_sae``, ``lr``, ``freeze``, ``seed`` and ``sites`` are short
    for the usual ones."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """``{option: [values]}``: every combination is a member, named like ``k8-seed0``; with ``members`` of each of
    them."""

    def options(self) -> dict[str, dict[str, Any]]:
        """``{name: {dotted option: value}}`` of every member; empty where one SAE is trained.

        Raises:
            InputError: An option that members cannot have for themselves, an axis without values, or a name twice.
        """
        if not self.members and not self.axes:
            return {}
        found: dict[str, dict[str, Any]] = {}
        axes = [[(name, value) for value in values] for name, values in self.axes.items()]
        if empty := [name for name, values in self.axes.items() if not values]:
            raise InputError(f"axes: {empty[0]} has no values")
        for member, given in (self.members or {"": {}}).items():
            for point in product(*axes):
                name = "-".join([*([member] if member else []), *(_word(a, v) for a, v in point)])
                if name in found:
                    raise InputError(f"members: two would be named {name}")
                found[name] = _dotted(given or {}, name) | _dotted(dict(point), name)
        return found


def _word(option: str, value: Any) -> str:
    if SHORT.get(option, option) == SHORT["sites"]:
        return site_word(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return option.rsplit(".", 1)[-1] + plain(text)


def _dotted(given: Mapping[str, Any], member: str, before: str = "") -> dict[str, Any]:
    """Options by their whole names: ``model: {freeze: decoder}`` is opened, what a dotted name has is its value."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{before}.{key}" if before else SHORT.get(key, key)
        if name != SHORT["sites"]:
            if isinstance(value, Mapping) and "class_path" not in value and "." not in key:
                found |= _dotted(value, member, name)
                continue
            if not (name.startswith("model.") or name == "seed_everything"):
                raise InputError(
                    f"member {member} has {name}: members differ in options of model and in seed_everything and sites "
                    f"(short: {', '.join(SHORT)}); items and trainer are the same for all"
                )
        if not before and key in _EITHER:
            found[SHORT[_EITHER[key]]] = None
        found[name] = value
    return found


def as_args(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line of a run of its own has them."""
    return [part for name, v in options.items() for part in (f"--{name}", v if isinstance(v, str) else json.dumps(v))]


def names_of(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options that differ between members, short names where there are."""
    short = {dotted: name for name, dotted in SHORT.items()}
    names = dict.fromkeys(name for o in options for name in o)
    return [short.get(n, n) for n in names if len({json.dumps(o.get(n)) for o in options}) > 1]

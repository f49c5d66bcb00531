"""What a command line asks for, as ways of steering and metrics: the parts of ``mmsae steer``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from mmsae.files import lines_of, read_text
from mmsae.hosts import load_host
from mmsae.sae import SAE
from mmsae.steering.edits.attach import check_site
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.edits.units import FeatureStats
from mmsae.steering.measure.scorers import CLIPJudge, Metric, Scorer, after, change, inside, kept, similarity, towards
from mmsae.steering.measure.sweep import Way
from mmsae.steering.methods.concept_vector import concept_steering, concept_vector
from mmsae.steering.methods.text import substitute, text_codes, word_pair
from mmsae.steering.methods.unlearn import ConceptStats, at_steps, concept_stats, forget
from mmsae.types import TEXT, InputError, Site

OPS = ("add", "set", "scale")


class Asked(NamedTuple):
    """The options of ``mmsae steer`` that say how to steer; see there."""

    features: Sequence[int] = ()
    op: str = "add"
    edit: Sequence[Mapping[str, Any]] = ()
    concept: str | None = None
    words: Sequence[str] = ()
    anchors: Any = None
    top: int = 16
    forget: str | None = None
    percentile: float = 99.995

    @property
    def method(self) -> str:
        """``features``, ``concept``, ``words`` or ``forget``.

        Raises:
            InputError: None of them, or several.
        """
        given = {"features": bool(self.features), "edit": bool(self.edit), "concept": bool(self.concept),
                 "words": bool(self.words), "forget": bool(self.forget)}  # fmt: skip
        named = [k for k, v in given.items() if v]
        if len(named) != 1:
            raise InputError(f"say how to steer by one of {', '.join(given)}: {', '.join(named) or 'none'} was given.")
        return "features" if named[0] == "edit" else named[0]


class Target(NamedTuple):
    """Who is steered where.

    Attributes:
        host: Diffusion host.
        sae: The SAE, where the host computes.
        site: The site.
        modality: Of the SAE's codes there.
        options: Of ``host.generate``.
    """

    host: Any
    sae: SAE
    site: Site
    modality: str
    options: Mapping[str, Any]

    def stats(self, prompts: Sequence[str], seed: int) -> FeatureStats:
        """Statistics of the codes while prompts are drawn (text sites: encoded), without steering."""
        if self.site.modality == TEXT:
            codes, tokens = text_codes(self.host, self.sae, self.site, prompts, self.modality)
            special = (tokens.special or {}).get(self.site.modality)
            return FeatureStats.of_codes([codes if special is None else codes.rows(~special)], self.modality)
        stream = self.host.stream(prompts, self.site, seed=seed, **self.options)
        codes = (self.sae.encode(t.x[self.site.modality], self.modality) for t in stream)
        return FeatureStats.of_codes(codes, self.modality)


def load_target(
    host: str, sae: str, site: str | None, device: str, precision: str, other: bool, options: Mapping[str, Any]
) -> Target:
    """Load host and SAE and check that they belong together.

    Raises:
        InputError: The host draws no pictures, the SAE names no site, or is of another one.
    """
    model = SAE.from_pretrained(sae)
    loaded = load_host(host, device=device, precision=precision)
    if not hasattr(loaded, "generate") or not hasattr(loaded, "stream"):
        raise InputError(
            f"host {host} draws no pictures: mmsae steer is for diffusers:... hosts; others are steered in Python, by "
            "mmsae.steering.edits.attach."
        )
    if site is None and not model.sites:
        raise InputError(f"SAE {sae} names no site: say where it was trained with --site.")
    spec = site if site is not None else next(iter(model.sites.values()))
    if other and isinstance(spec, Site):
        spec = f"{spec.module}:{spec.io}[{spec.tokens}]"
    at, modality = check_site(loaded, spec, model, other)
    return Target(loaded, model.to(loaded.device), at, modality, options)


#: Options that some methods decide themselves: their defaults, and who takes them.
_DEFAULTS = {"unit": "x_mean_active", "writeback": "delta", "policy": "post", "branch": "cond", "tokens": None}
_DEFAULTS |= {"active": None, "steps": None}
_TAKES = {
    "features": set(_DEFAULTS),
    "concept": {"steps"},
    "words": {"policy", "branch", "tokens", "steps"},
    "forget": {"policy", "writeback"},
}


def _refuse_unused(method: str, gates: Mapping[str, Any]) -> None:
    for option, default in _DEFAULTS.items():
        if gates.get(option, default) != default and option not in _TAKES[method]:
            shown = {"steps": "window"}.get(option, option)
            raise InputError(f"{shown} {gates[option]!r} has no meaning with {method}, which decides it itself.")


def make_way(
    asked: Asked, target: Target, gates: Mapping[str, Any], stats: FeatureStats, folder: Path, seed: int, progress: bool
) -> tuple[str, Callable[[float], Way]]:
    """Name of the intervention, and ``strength -> way of steering``.

    Raises:
        InputError: Options that do not go together.
    """
    method, at = asked.method, target.site
    _refuse_unused(method, gates)
    if method == "features":
        if asked.op not in OPS:
            raise InputError(f"op {asked.op!r} is not one of {', '.join(OPS)}; give others by --edit.")
        edit = Edit.from_dict(asked.edit) if asked.edit else getattr(Edit, asked.op)(list(asked.features), 1.0)
        name = "+".join(f"{op.kind} {' '.join(map(str, (op.ids or ('all',))[:4]))}" for op in edit.ops)
        iv = Intervention(edit, stats=stats, **gates)
        iv.bind(target.sae, target.modality)  # refuses bad features before anything is drawn
        return name, lambda s: {at: (target.sae, iv.vary(strength=[s])[0])}
    if method == "concept":
        vector = concept_vector(target.host, target.sae, at, asked.concept)
        window = {"steps": gates["steps"]} if gates.get("steps") else {}
        return asked.concept, lambda s: lambda prompts, seeds: concept_steering(target.host, at, vector, s, **window)
    if asked.anchors is None:
        raise InputError(f"{method} needs anchors: prompts that choose the features, others than those reported.")
    if method == "words":
        if len(asked.words) != 2:
            raise InputError(f"words are two, the one that is there and the wanted one, not {list(asked.words)}.")
        old, new = asked.words
        own = [p for p in read_prompts(asked.anchors) if re.search(rf"\b{re.escape(old)}\b", p)]
        if not own:
            raise InputError(f"none of the anchors has the word {old!r}.")
        pair = word_pair(target.host, target.sae, at, own, [replace_word(p, old, new) for p in own])
        given = {k: v for k, v in gates.items() if k not in ("unit", "writeback", "active")}
        return f"{old} to {new}", lambda s: {at: (target.sae, substitute(pair, asked.top, s, **given))}
    found = _concepts(asked, target, folder, seed, progress)
    forget(found, asked.forget, asked.percentile)
    more = {k: v for k, v in gates.items() if k in ("policy", "space", "writeback")}
    return f"forget {asked.forget}", lambda s: at_steps(
        at, target.sae, forget(found, asked.forget, asked.percentile, s), **more
    )


def _concepts(asked: Asked, target: Target, folder: Path, seed: int, progress: bool) -> ConceptStats:
    file = folder / "concept_stats.safetensors"
    if file.exists():
        return ConceptStats.load(file)
    found = concept_stats(
        target.host, target.sae, target.site, read_anchors(asked.anchors), modality=target.modality, seed=seed,
        progress=progress, **target.options,
    )  # fmt: skip
    found.save(file)
    return found


def read_anchors(given: Any) -> dict[str, list[str]]:
    """``{concept: prompts}``, as it is or from a YAML file.

    Raises:
        InputError: No such file, no YAML, or something else in it.
    """
    try:
        found = yaml.safe_load(read_text(given)) if isinstance(given, str) else given
    except yaml.YAMLError as e:
        raise InputError(f"anchors {given} cannot be read: {' '.join(str(e).split())}") from e
    lists = found.values() if isinstance(found, Mapping) else [None]
    if not all(isinstance(x, list) and x and all(isinstance(t, str) for t in x) for x in lists):
        raise InputError(f"forget needs anchors by concept, a YAML file of {{concept: [prompts]}}, not {found!r:.80}.")
    return {str(c): x for c, x in found.items()}


def at_least(least: int, **numbers: int) -> None:
    """Refuse numbers below ``least``, by their names."""
    for name, number in numbers.items():
        if number < least:
            raise InputError(f"{name} must be at least {least}, not {number}.")


def replace_word(prompt: str, old: str, new: str) -> str:
    """The prompt with another word, every time that it occurs."""
    return re.sub(rf"\b{re.escape(old)}\b", new, prompt)


def read_prompts(given: str | Sequence[str]) -> list[str]:
    """Prompts as they are, or from text files with one a line; no prompt twice.

    Raises:
        InputError: No prompts.
    """
    out: list[str] = []
    for text in [given] if isinstance(given, str) else given:
        lines = lines_of(read_text(text)) if text.endswith(".txt") else [text]
        out += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not out:
        raise InputError(f"no prompts in {given}.")
    return list(dict.fromkeys(out))


def load_scorer(spec: str) -> Scorer:
    """A scorer of the user's: ``MODULE:NAME``, or ``MODULE:NAME(ARGUMENT, ...)`` for what ``NAME(...)`` returns.

    Raises:
        InputError: No such thing.
    """
    match = re.fullmatch(r"([\w.]+):(\w+)(?:\((.*)\))?", spec)
    if not match:
        raise InputError(f"scorer {spec!r} is not of the form MODULE:NAME or MODULE:NAME(ARGUMENTS).")
    try:
        found = getattr(import_module(match[1]), match[2])
    except (ImportError, AttributeError) as e:
        raise InputError(f"scorer {spec!r}: {e}.") from e
    if match[3] is None:
        return found
    return found(*yaml.safe_load(f"[{match[3]}]"))


def make_metrics(
    scorers: Sequence[str], judge: str | None, target: str | None, words: Sequence[str], mask: Any, device: str
) -> dict[str, Metric]:
    """Metrics by name.

    Args:
        scorers: ``NAME=MODULE:SCORER`` each.
        judge: An open_clip host, or None.
        target: Text that should become true, for the judge.
        words: Two words; the target is then the prompt with the second one.
        mask: ``(H, W)`` or None.
        device: Of the judge.

    Raises:
        InputError: Malformed, or a target without a judge.
    """
    out: dict[str, Metric] = {}
    for text in scorers:
        name, sep, spec = text.partition("=")
        if not sep:
            raise InputError(f"scorer {text!r} is not of the form NAME=MODULE:SCORER.")
        out[name] = after(load_scorer(spec))
    if mask is not None:
        out["inside"] = inside(mask)
    if judge is None:
        if target is not None:
            raise InputError("a target text needs a judge: --judge names an open_clip host.")
        return out
    clip = CLIPJudge(load_host(judge, device=device))
    out["kept"] = kept(clip)
    if target is not None:
        out |= {"clip_gain": change(similarity(clip, target)), "towards": towards(clip, target)}
    elif words:
        out["towards"] = towards(clip, partial(replace_word, old=words[0], new=words[1]))
    return out


def read_mask(path: str | None) -> torch.Tensor | None:
    """``(H, W)`` weights in [0, 1] from a grey picture, white inside.

    Raises:
        InputError: No such picture.
    """
    if path is None:
        return None
    import numpy as np
    from PIL import Image

    try:
        return torch.from_numpy(np.asarray(Image.open(path).convert("L")).astype("float32") / 255)
    except OSError as e:
        raise InputError(f"mask {path} cannot be read: {e}.") from e


def plain(value: Any) -> Any:
    """As JSON keeps it, so that jobs can be compared."""
    return json.loads(json.dumps(value, default=str))

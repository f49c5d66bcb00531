"""What the options of ``mmsae steer`` ask for: host and site, interventions, metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from mmsae.files import lines_of, read_text
from mmsae.hosts import DiffusionHost, load_host
from mmsae.load import load_unchecked
from mmsae.options import OneProcessRun
from mmsae.sae import SAE
from mmsae.steering.edits.attach import check_site
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.edits.units import FeatureStats
from mmsae.steering.measure.scorers import CLIPJudge, Metric, Scorer, after, change, inside, kept, similarity, towards
from mmsae.steering.measure.sweep import Steering
from mmsae.steering.methods.concept_vector import concept_steering, concept_vector
from mmsae.steering.methods.text import substitute, text_codes, word_pair
from mmsae.steering.methods.unlearn import ConceptStats, at_steps, concept_stats, forget
from mmsae.steering.options import Edits, Sweep
from mmsae.types import TEXT, InputError, Site

OPS = ("add", "set", "scale")


def method_of(edits: Edits) -> str:
    """``features``, ``concept``, ``words`` or ``forget``; none of them, or several, are refused."""
    given = [k for k in ("features", "edit", "concept", "words", "forget") if getattr(edits, k)]
    if len(given) != 1:
        raise InputError(
            "say how to steer by one of features, edit, concept, words, forget: "
            f"{', '.join(given) or 'none'} was given."
        )
    return "features" if given[0] == "edit" else given[0]


class SteeredSite(NamedTuple):
    """Who is steered where."""

    host: Any
    sae: SAE  #: On the device of the host.
    site: Site
    modality: str  #: Modality of the SAE's codes there.
    options: Mapping[str, Any]  #: Options of ``host.generate``.

    def stats(self, prompts: Sequence[str], seed: int) -> FeatureStats:
        """Statistics of the codes while prompts are drawn (text sites: encoded), without steering."""
        if self.site.modality == TEXT:
            codes, tokens = text_codes(self.host, self.sae, self.site, prompts, self.modality)
            special = (tokens.special or {}).get(self.site.modality)
            return FeatureStats.of_codes([codes if special is None else codes.rows(~special)], self.modality)
        stream = self.host.stream(prompts, self.site, seed=seed, **self.options)
        codes = (self.sae.encode(t.x[self.site.modality], self.modality) for t in stream)
        return FeatureStats.of_codes(codes, self.modality)


def load_site(
    host: str, sae: str, site: str | None, device: str, run: OneProcessRun, options: Mapping[str, Any]
) -> SteeredSite:
    """Load host and SAE and check that they belong together, at a site that need not be the one it was trained at.

    Raises:
        InputError: The host draws no images, the SAE names no site, or is of another one.
    """
    model, loaded = load_unchecked(sae, host, device, run.precision)
    if not isinstance(loaded, DiffusionHost):
        raise InputError(
            f"host {host} draws no images: mmsae steer is for diffusers:... hosts; others are steered in Python, by "
            "mmsae.steering.edits.attach."
        )
    if site is None and not model.sites:
        raise InputError(f"SAE {sae} names no site: say where it was trained with --site.")
    spec = site if site is not None else next(iter(model.sites.values()))
    at, modality = check_site(loaded, spec, model, run.allow_other_site)
    return SteeredSite(loaded, model, at, modality, options)


def features_of(edits: Edits) -> list[int]:
    """Latents that options name, in order, each once; empty where a method chooses them."""
    ids = [*edits.features, *(j for op in edits.edit for j in op.get("ids") or ())]
    return list(dict.fromkeys(ids))


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


def make_steering(
    edits: Edits,
    at: SteeredSite,
    gates: Mapping[str, Any],
    stats: FeatureStats,
    folder: Path,
    seed: int,
    progress: bool,
) -> tuple[str, Callable[[float], Steering]]:
    """Name of the intervention, and ``strength -> how the host is steered``.

    ``gates`` are fields of the intervention; statistics of concepts, measured on images of ``seed``, are kept in
    ``folder``.
    """
    method, site = method_of(edits), at.site
    _refuse_unused(method, gates)
    if method == "features":
        if edits.op not in OPS:
            raise InputError(f"op {edits.op!r} is not one of {', '.join(OPS)}; give others by --edit.")
        edit = Edit.from_dict(edits.edit) if edits.edit else getattr(Edit, edits.op)(list(edits.features), 1.0)
        name = "+".join(f"{op.kind} {' '.join(map(str, (op.ids or ('all',))[:4]))}" for op in edit.ops)
        iv = Intervention(edit, stats=stats, **gates)
        iv.bind(at.sae, at.modality)  # refuses bad features before anything is drawn
        return name, lambda s: {site: (at.sae, iv.vary(strength=[s])[0])}
    if method == "concept":
        vector = concept_vector(at.host, at.sae, site, edits.concept)
        window = {"steps": gates["steps"]} if gates.get("steps") else {}
        return edits.concept, lambda s: lambda prompts, seeds: concept_steering(at.host, site, vector, s, **window)
    if edits.anchors is None:
        raise InputError(f"{method} needs anchors: prompts that choose the features, others than those reported.")
    if method == "words":
        if len(edits.words) != 2:
            raise InputError(f"words are two, the one that is there and the wanted one, not {list(edits.words)}.")
        old, new = edits.words
        own = [p for p in read_prompts(edits.anchors) if re.search(rf"\b{re.escape(old)}\b", p)]
        if not own:
            raise InputError(f"none of the anchors has the word {old!r}.")
        pair = word_pair(at.host, at.sae, site, own, [replace_word(p, old, new) for p in own])
        given = {k: v for k, v in gates.items() if k not in ("unit", "writeback", "active")}
        return f"{old} to {new}", lambda s: {site: (at.sae, substitute(pair, edits.top, s, **given))}
    found = _concepts(edits.anchors, at, folder / "concept_stats.safetensors", seed, progress)
    forget(found, edits.forget, edits.percentile)  # refuses before anything is drawn
    more = {k: v for k, v in gates.items() if k in ("policy", "space", "writeback")}
    return f"forget {edits.forget}", lambda s: at_steps(
        site, at.sae, forget(found, edits.forget, edits.percentile, s), **more
    )


def _concepts(anchors: Any, at: SteeredSite, file: Path, seed: int, progress: bool) -> ConceptStats:
    if file.exists():
        return ConceptStats.load(file)
    prompts = read_anchors(anchors)
    found = concept_stats(
        at.host, at.sae, at.site, prompts, modality=at.modality, seed=seed, progress=progress, **at.options
    )
    found.save(file)
    return found


def read_anchors(given: Any) -> dict[str, list[str]]:
    """``{concept: prompts}``, as it is or from a YAML file."""
    try:
        found = yaml.safe_load(read_text(given)) if isinstance(given, str) else given
    except yaml.YAMLError as e:
        raise InputError(f"anchors {given} cannot be read: {' '.join(str(e).split())}") from e
    lists = found.values() if isinstance(found, Mapping) else [None]
    if not all(isinstance(x, list) and x and all(isinstance(t, str) for t in x) for x in lists):
        raise InputError(f"forget needs anchors by concept, a YAML file of {{concept: [prompts]}}, not {found!r:.80}.")
    return {str(c): x for c, x in found.items()}


def replace_word(prompt: str, old: str, new: str) -> str:
    """The prompt with another word, every time that it occurs."""
    return re.sub(rf"\b{re.escape(old)}\b", new, prompt)


def read_prompts(given: str | Sequence[str]) -> list[str]:
    """Prompts as they are, or from text files with one a line; no prompt twice."""
    out: list[str] = []
    for text in [given] if isinstance(given, str) else given:
        lines = lines_of(read_text(text)) if text.endswith(".txt") else [text]
        out += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not out:
        raise InputError(f"no prompts in {given}.")
    return list(dict.fromkeys(out))


def load_scorer(spec: str) -> Scorer:
    """A scorer of the user's: ``MODULE:NAME``, or ``MODULE:NAME(ARGUMENT, ...)`` for what ``NAME(...)`` returns."""
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


def make_metrics(sweep: Sweep, words: Sequence[str], mask: torch.Tensor | None, device: str) -> dict[str, Metric]:
    """Metrics by name: the user's scorers, and what a mask ``(H, W)`` and the judge allow.

    Without a target text, the target is the prompt with the second of two ``words``.
    """
    out: dict[str, Metric] = {}
    for text in sweep.scorers:
        name, sep, spec = text.partition("=")
        if not sep:
            raise InputError(f"scorer {text!r} is not of the form NAME=MODULE:SCORER.")
        out[name] = after(load_scorer(spec))
    if mask is not None:
        out["inside"] = inside(mask)
    if sweep.judge is None:
        if sweep.target is not None:
            raise InputError("a target text needs a judge: --judge names an open_clip host.")
        return out
    clip = CLIPJudge(load_host(sweep.judge, device=device))
    out["kept"] = kept(clip)
    if sweep.target is not None:
        out |= {"clip_gain": change(similarity(clip, sweep.target)), "towards": towards(clip, sweep.target)}
    elif words:
        out["towards"] = towards(clip, partial(replace_word, old=words[0], new=words[1]))
    return out


def read_mask(path: str | None) -> torch.Tensor | None:
    """``(H, W)`` weights in [0, 1] from a grey image, white inside."""
    if path is None:
        return None
    import numpy as np
    from PIL import Image

    try:
        return torch.from_numpy(np.asarray(Image.open(path).convert("L")).astype("float32") / 255)
    except OSError as e:
        raise InputError(f"mask {path} cannot be read: {e}.") from e

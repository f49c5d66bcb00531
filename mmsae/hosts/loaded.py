"""Whether all weights of a host came from its files: what the libraries say about that, and what follows."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.errors import Warned
from mmsae.types import InputError

ALLOW = "--allow-random-weights (in Python and recipes allow_random: true) accepts that"


class Loaded(NamedTuple):
    """What came of loading a model's tensors."""

    total: int  #: Tensors that the model has.
    missing: list[str]  #: Names of those that no file had, and of those whose shape was another, with both shapes.
    unexpected: list[str]  #: Names of tensors in the files that the model has no place for.

    @classmethod
    def of(cls, model: nn.Module, info: Any) -> Loaded:
        """Read the ``output_loading_info`` of transformers or diffusers."""
        other = [f"{n} {tuple(a)} in the file, {tuple(b)} in the model" for n, a, b in info.get("mismatched_keys", ())]
        missing = sorted(info.get("missing_keys", ())) + sorted(other)
        return cls(len(model.state_dict()), missing, sorted(info.get("unexpected_keys", ())))


def check(name: str, found: Mapping[str, Loaded], allow_random: bool) -> bool:
    """Whether some weights of a host are random, which is refused without ``allow_random``; warn of what is not used.

    Args:
        name: The host's name, for messages.
        found: ``{part: what came of loading it}``; the part of a host of one model is empty.
        allow_random: Warn instead.
    """
    named = [(p and f"{p}: ", f) for p, f in sorted(found.items())]
    lacking = [f"{p}{len(f.missing)} of {f.total} ({_first(f.missing)})" for p, f in named if f.missing]
    extra = [f"{p}{len(f.unexpected)} ({_first(f.unexpected)})" for p, f in named if f.unexpected]
    no_place = f"its files hold tensors that it has no place for: {'; '.join(extra)}"
    if not lacking:
        if extra:
            warnings.warn(f"host {name!r}: {no_place}.", Warned)
        return False
    said = f"host {name!r} lacks weights, which would be random: {'; '.join(lacking)}"
    said += f"; {no_place}" if extra else ""
    if not allow_random:
        raise InputError(f"{said}; {ALLOW}.")
    warnings.warn(f"{said}.", Warned)
    return True


def plain_config(config: Any) -> Any:
    """A configuration without what does not change outputs: folders, versions, and dtypes (weights have them)."""
    if isinstance(config, dict):
        drop = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_internal")
        return {str(k): plain_config(v) for k, v in config.items() if k not in drop}
    if isinstance(config, (list, tuple)):
        return [plain_config(v) for v in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)


def dtype_of(asked: str | torch.dtype) -> str | torch.dtype:
    """A dtype of torch by its name, or by one of ``bf16``, ``fp16`` and ``fp32``; ``auto`` stays as it is.

    Raises:
        InputError: Torch has none of that name.
    """
    if not isinstance(asked, str) or asked == "auto":
        return asked
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(asked, asked).removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise InputError(f"dtype {name!r} is none of torch.")
    return getattr(torch, name)


def _first(names: Sequence[str], n: int = 3) -> str:
    return ", ".join([*names[:n], *(["..."] if len(names) > n else [])])


@contextmanager
def recorded(seed: int | None = None) -> Iterator[dict[str, Loaded]]:
    """While open, every model that a pipeline loads is recorded by the name of its folder.

    diffusers hands no loading info out of ``DiffusionPipeline.from_pretrained``, so its parts are asked for it. What
    they say is read when the context closes: within the library's call a fault of ours would read as the host's. Each
    part draws what it lacks from ``seed``, for parts are loaded in no fixed order.
    """
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    found: dict[str, Loaded] = {}
    made: list[tuple[Any, Any, Any, Tensor]] = []

    def asking(original: Any) -> Any:
        @functools.wraps(original)
        def load(cls: Any, path: Any, *args: Any, **options: Any) -> Any:
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            model, info = original(cls, path, *args, **options, output_loading_info=True)
            made.append((path, model, info, torch.get_rng_state()))
            return model

        return classmethod(load)

    with ExitStack() as stack:
        for base in (ModelMixin, PreTrainedModel):
            original = base.__dict__["from_pretrained"]
            stack.callback(setattr, base, "from_pretrained", original)
            base.from_pretrained = asking(original.__func__)
        with silent():
            yield found
    for path, model, info, state in made:
        found[Path(path).name] = Loaded.of(model, info)
        if seed is not None and isinstance(model, ModelMixin):
            torch.set_rng_state(state)  # as if it went on drawing
            _initialise(model, info["missing_keys"])


@contextmanager
def of_states() -> Iterator[dict[int, Loaded]]:
    """While open, ``{id of the model: what came of it}`` of every ``load_state_dict``.

    timm loads whatever there is as soon as another number of classes is asked for, and says nothing.
    """
    found: dict[int, Loaded] = {}
    original = nn.Module.load_state_dict

    @functools.wraps(original)
    def load(self: nn.Module, *args: Any, **options: Any) -> Any:
        keys = original(self, *args, **options)
        found[id(self)] = Loaded(len(self.state_dict()), list(keys.missing_keys), list(keys.unexpected_keys))
        return keys

    nn.Module.load_state_dict = load
    try:
        yield found
    finally:
        nn.Module.load_state_dict = original


def _initialise(model: Any, names: Sequence[str]) -> None:
    """Draw what a model of diffusers lacks as its class does: diffusers leaves it uninitialised memory."""
    if names:
        drawn, own = type(model).from_config(model.config).state_dict(), model.state_dict()
        for name in names:
            own[name].copy_(drawn[name])


@contextmanager
def quiet(folder: str | Path | None = None, *libraries: str) -> Iterator[None]:
    """Without progress bars where there is nothing to wait for: writing, or a folder under 200 MB.

    Args:
        folder: What is read; None while something is written.
        *libraries: The libraries that read it; default: transformers.
    """
    path = Path(folder) if folder is not None else None
    small = path is None or (path.is_dir() and sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) < 2e8)
    logs = [import_module(f"{name}.utils.logging") for name in libraries or ("transformers",)]
    hidden = [log for log in logs if small and log.is_progress_bar_enabled()]
    for log in hidden:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in hidden:
            log.enable_progress_bar()


@contextmanager
def silent() -> Iterator[None]:
    """Without the libraries' own reports of missing weights, for :func:`check` says it in a sentence.

    Nor with the doubts of diffusers about classes that fit by their form.
    """

    def wanted(record: logging.LogRecord) -> bool:
        reports = ("LOAD REPORT", "newly initialized", "were not used when", "Expected types for")
        return not any(s in record.getMessage() for s in reports)

    names = ("transformers.modeling_utils", "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils")
    logs = [logging.getLogger(n) for n in names]
    for log in logs:
        log.addFilter(wanted)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(wanted)

"""Options of the commands: frozen dataclasses, each field documented at the field, shared where they mean the same.

A command is a function in ``command.py`` of its folder; what it needs is a parameter, and what it shares with other
commands (or would make its list of parameters long) is a dataclass from here or from beside the command::

    def filter_command(
        sae: str, shards: str | list[str], out: str, keep: float = 0.5, run: SAERun = SAERun(), data: Data = Data()
    ) -> str:

On the command line and in YAML all options stand side by side (``--keep .3 --device cpu``, never ``--run.device``), and
the help shows each dataclass as a group, under the first line of its docstring. :func:`call` calls such a function with
flat keywords, too. A command whose default is another says so in its signature, ``run: SAERun = SAERun(batch_size=8)``;
one that lacks an option has a subclass in which the field is ``field(default=..., init=False)``.

``mmsae X --help`` imports the command's module and nothing heavy: neither it nor a package above it imports torch or
what imports it. :mod:`mmsae.types`, :mod:`mmsae.files`, :mod:`mmsae.recipes` and this module do not, packages give
their names by :mod:`mmsae.lazy`, and the work stands in other modules, imported inside the function.
``tests/test_cli_help.py`` asks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_origin, get_type_hints

from mmsae.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Where and how the host computes."""

    device: str = "auto"
    """``cpu``, ``cuda`` or ``auto``."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the host: ``bf16`` and ``fp16`` are autocast, or the type of its weights where it generates."""
    batch_size: int | None = None
    """Samples per forward pass. Default: 256; on a CPU as many as have the area of 16 images of 224 pixels."""
    workers: int | None = None
    """Decoding processes per device; default: the free cores, 8 at most. 0 decodes in the main process."""
    progress: bool = True
    """Whether to print what is done and show bars."""


@dataclass(frozen=True)
class SAERun(Run):
    """Where and how the host and the SAE compute."""

    allow_other_site: bool = False
    """Accept an SAE that was trained on another host of equal width, such as a copy of its own."""


@dataclass(frozen=True)
class OneProcessRun(SAERun):
    """Where and how the host and the SAE compute."""

    workers: int | None = field(default=0, init=False)


@dataclass(frozen=True)
class Spread:
    """Who does the work; the result is the same whoever does (docs/how-to/scale.md)."""

    devices: int | None = None
    """Number of devices (``cpu``: processes), one host on each. Default: 1; under Ray as many workers as the cluster
    has room for."""
    engine: Literal["processes", "ray"] = "processes"
    """``processes`` of this machine, or workers of a ``ray`` cluster: that of RAY_ADDRESS, else the one on this
    machine, else one that is made of this machine."""
    gpus: float | None = None
    """GPUs of a worker under Ray, as .5 for two workers on one; default: 1, or 0 with --device cpu."""
    retries: int = 2
    """How often Ray tries a shard again that ended with its worker or with another error than one of the input."""
    part: str = ""
    """``I/N``: do the I-th of N parts of the shards and merge nothing, without knowing of the others, as a task of a
    batch queue. Default: that of SLURM_ARRAY_TASK_ID where there is an array; ``none``: everything, in spite of it."""
    merge: bool = False
    """Merge what parts have done, which is refused while a shard is missing."""


@dataclass(frozen=True)
class Drawing:
    """How images are drawn."""

    steps: int = 20
    """Number of denoising steps."""
    guidance: float = 3.0
    """Guidance scale; up to 1 there is no unconditional branch."""
    negative: str | None = None
    """Text to guide away from; None: the pipeline's own."""


@dataclass(frozen=True)
class RankRun(SAERun):
    """Where and how the host and the SAE compute; a trainer says on which devices."""

    device: str = field(default="auto", init=False)

    def on(self, device: str) -> SAERun:
        """The same on a device."""
        return SAERun(**vars(self) | {"device": device})


@dataclass(frozen=True)
class Shards:
    """What is made of the samples' files."""

    fault_limit: float = 0.05
    """Largest share of samples that may be unusable."""


@dataclass(frozen=True)
class Data(Shards):
    """What is made of the samples' files."""

    caption_field: str = ""
    """Field of the samples' json that holds the caption; empty: ``captions``, ``txt`` or json's ``caption``. Brackets
    go into lists and objects, as captions[random] (docs/how-to/data.md)."""


@dataclass(frozen=True)
class UniqueData(Data):
    """What is made of the samples' files."""

    duplicates: Literal["refuse", "drop"] = "refuse"
    """What happens where a uid occurs twice: ``refuse`` ends the job; ``drop`` keeps the first in the order of the
    shards, and counts and lists the others, which do not count towards the fault limit."""


@dataclass(frozen=True)
class ListedData(UniqueData):
    """What is made of the samples' files."""

    keep: str | None = None
    """File of uids (``uids.npy`` of ``mmsae filter``, or DataComp's): only samples whose uid it lists are used."""


@dataclass(frozen=True)
class Process:
    """This process."""

    threads: int | None = None
    """CPU threads of this process; processes that it starts inherit the number. Two jobs on one machine need fewer than
    its cores each, or they slow each other down. Default: torch's own, all cores."""

    def use(self) -> None:
        """Compute with so many threads from now on, and let processes that are started do so."""
        use_threads(self.threads)


@dataclass(frozen=True)
class HostOptions:
    """How the host is loaded."""

    host_options: dict[str, Any] = field(default_factory=dict)
    """Options that the host is loaded with, as --host-options.img_size 224 or as JSON. They become part of its name, so
    that stores and SAEs know them (docs/how-to/hosts.md)."""
    allow_random_weights: bool = False
    """Accept a host whose files lack weights, with random ones in their place."""

    def name(self, host: str | None) -> str | None:
        """The name of a host with these options in it."""
        options = {k.replace("-", "_"): v for k, v in self.host_options.items()}
        if self.allow_random_weights:
            options |= {"allow_random": True}
        if not options:
            return host
        from mmsae.hosts import with_options

        return with_options(host or "", options)


def use_threads(n: int | None) -> None:
    """Compute with ``n`` threads from now on, and let processes that are started do so; None changes nothing.

    Raises:
        InputError: Fewer than one.
    """
    if n is None:
        return
    if n < 1:
        raise InputError(f"threads is {n}; it must be at least 1")
    import os

    import torch

    os.environ |= {"OMP_NUM_THREADS": str(n), "MKL_NUM_THREADS": str(n)}
    torch.set_num_threads(n)


def at_least(least: int, **given: int | None) -> None:
    """Refuse numbers that are too small; None is no number.

    Raises:
        InputError: Names the first.
    """
    for name, n in given.items():
        if n is not None and n < least:
            raise InputError(f"{name} is {n}; it must be at least {least}")


def groups(fn: Callable) -> dict[str, type]:
    """``{parameter: dataclass}`` of the parameters of a command that are several options each."""
    hints = get_type_hints(fn)
    return {n: hints[n] for n in inspect.signature(fn).parameters if dataclasses.is_dataclass(hints.get(n))}


def names(group: type) -> list[str]:
    """Names of the options of a dataclass."""
    return [f.name for f in dataclasses.fields(group) if f.init]


def add_group(parser: ArgumentParser, group: type, default: Any = None) -> None:
    """Add the options of a dataclass to a parser, as a group of its help; ``default`` is an instance of it."""
    from jsonargparse import set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        parser.add_class_arguments(group, None)
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)
    if default is not None:
        parser.set_defaults({n: getattr(default, n) for n in names(group)})


def take(group: type[T], flat: dict[str, Any], default: T | None = None) -> T:
    """Options of one dataclass, taken out of flat keywords; ``default`` has the values of those that are not there."""
    hints = get_type_hints(group)
    given = {n: flat.pop(n) for n in names(group) if n in flat}
    given = {n: tuple(v) if get_origin(hints[n]) is tuple and isinstance(v, list) else v for n, v in given.items()}
    return group(**given) if default is None else dataclasses.replace(default, **given)


def default_of(fn: Callable, parameter: str) -> Any:
    """The default of a parameter, None where it has none."""
    default = inspect.signature(fn).parameters[parameter].default
    return None if default is inspect.Parameter.empty else default


def grouped(fn: Callable, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keywords as a command takes them, its dataclasses assembled."""
    left, made = dict(flat), {}
    for name, group in groups(fn).items():
        default = default_of(fn, name)
        if name not in left and (default is None or set(names(group)) & set(left)):
            made[name] = take(group, left, default)
    return {**left, **made}


def call(fn: Callable[..., T], *args: Any, **flat: Any) -> T:
    """Call a command with flat keywords, as its command line has them: ``call(filter_command, device="cpu", ...)``."""
    return fn(*args, **grouped(fn, flat))


def flat(cls: type[T]) -> type[T]:
    """Let a class take the options of its dataclasses side by side, in Python, in recipes and on the command line.

    ``__init__`` declares ``mixing: Mixing = Mixing()``, users write ``batch_size=64`` and ``--data.batch_size 64``; the
    help has what is said at the fields.
    """
    from docstring_parser import parse_from_object

    init, own = cls.__init__, groups(cls.__init__)
    parameters, said = [], [(cls.__doc__ or "").rstrip()]
    for name, parameter in inspect.signature(init, eval_str=True).parameters.items():
        if name not in own:
            parameters.append(parameter)
            continue
        group, hints = own[name], get_type_hints(own[name])
        docs = {p.arg_name: p.description for c in reversed(group.__mro__[:-1]) for p in parse_from_object(c).params}
        for option in names(group):
            kind, default = inspect.Parameter.KEYWORD_ONLY, getattr(parameter.default, option, inspect.Parameter.empty)
            parameters.append(inspect.Parameter(option, kind, default=default, annotation=hints[option]))
            said.append(f"    {option}: {' '.join(docs[option].split())}")
    parameters.sort(key=lambda p: p.kind)

    @functools.wraps(init)
    def side_by_side(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **grouped(init, options))

    side_by_side.__signature__ = inspect.Signature(parameters)
    cls.__init__, cls.__doc__ = side_by_side, "\n    ".join(said) + "\n"
    return cls


def side_by_side(fn: Callable[..., T]) -> Callable[..., T]:
    """Let a library function take the options of its dataclasses side by side, too: ``extract(..., batch_size=64)``."""

    @functools.wraps(fn)
    def called(*args: Any, **options: Any) -> T:
        return fn(*args, **grouped(fn, options))

    return called

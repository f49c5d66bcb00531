"""Options that every command has, and those of every command that loads a host."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_shared(parser: ArgumentParser) -> None:
    """Options of every command, and of every one that loads a host."""
    from mmsae.threads import HELP

    known = {a.dest for a in parser._actions}
    if "threads" not in known:
        parser.add_argument("--threads", type=int | None, default=None, help=HELP)
    if "host" in known:
        parser.add_argument(
            "--host_options",
            type=dict[str, Any],
            default={},
            help="Options that the host is loaded with, as --host-options.img_size 224 or as JSON. They become part of "
            "its name, so that stores and SAEs know them (docs/hosts.md).",
        )
        parser.add_argument(
            "--allow_random_weights",
            type=bool,
            default=False,
            help="Accept a host whose files lack weights, with random ones in their place.",
        )


def take_shared(values: dict[str, Any], wanted: Collection[str]) -> None:
    """Do what the options of :func:`add_shared` say; the function itself takes those of ``wanted`` only."""
    if "threads" not in wanted:
        from mmsae.threads import use_threads

        use_threads(values.pop("threads"))
    if "host" in values:
        options = {k.replace("-", "_"): v for k, v in values.pop("host_options").items()}
        if values.pop("allow_random_weights"):
            options |= {"allow_random": True}
        if options:
            from mmsae.hosts import with_options

            values["host"] = with_options(values["host"] or "", options)

"""The ``mmsae`` command. Lightning's subcommands train; the others are plain functions with typed arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from mmsae.types import InputError

LIGHTNING = ("fit", "validate", "test", "predict")
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("mmsae.demo:demo", "train and compare SAEs on a generated world, end to end, and write a report"),
    "pretrain-clip": ("mmsae.world.clip:pretrain_clip", "train a small open_clip model on image-text shards"),
    "extract": ("mmsae.cache.extract:extract", "run a host over shards and store its activations"),
    "info": ("mmsae.info:info", "describe a store, an SAE folder, a host folder or shards"),
    "convert": ("mmsae.interop:convert", "turn another library's checkpoint into an SAE folder"),
}

USAGE = """usage: mmsae COMMAND [options]      (mmsae COMMAND --help explains every option)

Train:
  fit             train an SAE: mmsae fit -c configs/train/paired_topk_store.yaml --data.store STORE
  validate, test, predict   run a trained one over data (Lightning)

Other commands:
{others}
"""


def _lightning(args: list[str]) -> None:
    from mmsae.training.cli import run

    run(args)


def _command(name: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    target, summary = COMMANDS[name]
    module, function = target.split(":")
    fn: Callable = getattr(import_module(module), function)
    parser = ArgumentParser(prog=f"mmsae {name}", description=summary)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below")
    parser.add_function_arguments(fn, as_group=False)
    values = parser.instantiate_classes(parser.parse_args(args)).as_dict()
    values.pop("config", None)
    result = fn(**values)
    if result is not None:
        print(result)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 and one sentence on stderr when the input is wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(others="\n".join(f"  {n:15s} {s}" for n, (_, s) in COMMANDS.items())))
        return
    if args[0] in ("-V", "--version"):
        from mmsae import __version__

        print(f"mmsae {__version__}")
        return
    try:
        if args[0] in LIGHTNING:
            _lightning(args)
        elif args[0] in COMMANDS:
            _command(args[0], args[1:])
        else:
            raise InputError(f"no command {args[0]!r}; there are {', '.join((*LIGHTNING, *COMMANDS))}")
    except InputError as e:
        print(f"mmsae: error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

"""The ``mmsae`` command. Lightning's subcommands train; the others are plain functions with typed arguments."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from argparse import Action, ArgumentError
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin

from mmsae.allocator import keep_memory
from mmsae.errors import InputError, out_of_memory, plain_warnings
from mmsae.lazy import torch_for_good, uncollected
from mmsae.options import HostOptions, Process, add_group, call, default_of, groups, names, take
from mmsae.remote.urls import is_url, shown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """One plain command."""

    target: str  #: ``module:function``; imported when the command is used
    summary: str  #: What it does, for ``mmsae --help``
    example: str  #: One line that works, for ``mmsae X --help``
    positional: bool = False  #: Whether its required arguments are given by place instead of by name
    places: tuple[str, ...] = ()  #: Arguments that are given by place and have another name beside it, which may do


LIGHTNING = ("fit", "validate", "test", "predict")
# fmt: off
COMMANDS = {
    "demo": Command(
        "mmsae.demo.command:demo", "train and compare SAEs on a generated world, end to end, and write a report",
        "mmsae demo --out runs/demo"),
    "pretrain-clip": Command(
        "mmsae.world.models.command:pretrain_clip", "train a small open_clip model on image-text shards",
        "mmsae pretrain-clip --shards 'shards/train-*.tar' --out clip"),
    "pretrain-diffusion": Command(
        "mmsae.world.models.command:pretrain_diffusion",
        "train a tiny text-to-image Stable Diffusion on image-text shards",
        "mmsae pretrain-diffusion --shards 'shards/train-*.tar' --out diffusion"),
    "extract": Command(
        "mmsae.activations.command:extract_command", "run a host over shards and store its activations",
        "mmsae extract --host ViT-B-32/laion2b_s34b_b79k --shards 'shards/train-*.tar' --out store --precision bf16"),
    "bench": Command(
        "mmsae.bench.command:bench", "test a published claim on a generated world",
        "mmsae bench filter --out runs/bench_filter --quick", True),
    "look": Command(
        "mmsae.look.command:look", "see the concepts of your own photographs: from a folder of them to a browser",
        "mmsae look ~/Pictures --out runs/look", True),
    "filter": Command(
        "mmsae.filtering.command:filter_command", "keep the best image-text samples, and say why",
        "mmsae filter --sae runs/paired/sae --shards 'shards/train-*.tar' --out kept --keep 0.5"),
    "export": Command(
        "mmsae.filtering.export:export", "write the samples of a list of uids as shards",
        "mmsae export --shards 'shards/train-*.tar' --keep kept/uids.npy --out listed"),
    "sweep": Command(
        "mmsae.training.sweep:sweep", "train a recipe at several k and sizes, and draw FVU over L0",
        "mmsae sweep --store store --out runs/sweep --k 8 16 --ratio 4 8"),
    "info": Command(
        "mmsae.info:info", "describe an SAE, a run, a store, a host folder or shards",
        "mmsae info runs/paired/sae", True),
    "status": Command(
        "mmsae.jobs.command:status", "how far a job over shards is, which shards failed, and what to run next",
        "mmsae status runs/kept", True),
    "weights": Command(
        "mmsae.lvlm.weights.command:weights", "cross-modal weights of an SAE on an LVLM, and tokens",
        "mmsae weights --sae runs/tokens/sae --host lvlm:llava --shards 'shards/train-*.tar' --out weights"),
    "patches": Command(
        "mmsae.lvlm.patches.command:patches", "which patches of an image a vision-language model needs",
        "mmsae patches --sae runs/tokens/sae --host lvlm:llava --shards 'shards/train-*.tar' --out patches"),
    "align": Command(
        "mmsae.lvlm.decoding.align:align", "aligned states of a store, for VL-SAE on an LVLM",
        "mmsae align --store states --aligner runs/aligner/aligner --out aligned"),
    "pope": Command(
        "mmsae.lvlm.hallucination.pope:pope", "yes/no questions about objects, several ways of answering",
        "mmsae pope --host lvlm:llava --shards 'shards/val-*.tar' --out runs/pope --images 100"),
    "chair": Command(
        "mmsae.lvlm.hallucination.chair:chair_command", "objects that captions invent, several ways of decoding",
        "mmsae chair --host lvlm:llava --shards 'shards/val-*.tar' --out runs/chair --images 100"),
    "zeroshot": Command(
        "mmsae.evaluation.zeroshot.command:zeroshot", "classify images by class names, with and without an SAE",
        "mmsae zeroshot --sae runs/paired/sae --shards 'cifar10-test-*.tar' --classes classes.txt --out runs/zeroshot"),
    "ood": Command(
        "mmsae.evaluation.ood.command:ood", "detect images unlike the training ones, on features and on codes",
        "mmsae ood --sae runs/paired/sae --id 'cifar10-*.tar' --ood 'mnist=mnist-*.tar' --out runs/ood"),
    "steer": Command(
        "mmsae.steering.command:steer", "steer a diffusion model, beside random features",
        "mmsae steer --host diffusers:pipeline --sae runs/unet/sae --features 168 --prompts prompts.txt"),
    "evaluate": Command(
        "mmsae.evaluation.card.command:evaluate", "the benchmark card of an SAE, with controls",
        "mmsae evaluate --sae runs/demo/paired_topk/sae --suite configs/eval/world.yaml --out runs/card"),
    "control": Command(
        "mmsae.evaluation.control:control", "the control of an SAE: the same with random weights, and as sparse",
        "mmsae control --sae runs/paired/sae --out runs/random/sae"),
    "evidence": Command(
        "mmsae.interpret.evidence.command:evidence", "collect what the latents of an SAE fire on in a corpus",
        "mmsae evidence --sae runs/paired/sae --shards 'shards/val-*.tar' --out runs/paired/evidence"),
    "name": Command(
        "mmsae.interpret.names.command:name", "name latents by their evidence, and measure how well the names hold",
        "mmsae name runs/evidence", places=("evidence",)),
    "analyse": Command(
        "mmsae.interpret.analyse.command:analyse", "compare, correlate, cluster and search data sets by concepts",
        "mmsae analyse diff runs/cats/evidence runs/dogs/evidence --out runs/cats_and_dogs", True),
    "scenarios": Command(
        "mmsae.interpret.scenarios.command:scenarios", "rare, surprising and failing situations, and suites of them",
        "mmsae scenarios runs/evidence --query 'fog & ~day' --failures failures.parquet", places=("evidence",)),
    "attributes": Command(
        "mmsae.interpret.attributes.command:attributes", "words for what features of a diffusion model set in images",
        "mmsae attributes --host diffusers:pipeline --sae runs/unet/sae --judge ViT-B-32/openai --prompts prompts.txt"),
    "explore": Command(
        "mmsae.interpret.browser.command:explore", "a browser of latents and samples in a folder, without a server",
        "mmsae explore runs/evidence", places=("evidence", "other")),
    "score": Command(
        "mmsae.interpret.scores.command:score", "score the names of latents, beside shuffled names and random weights",
        "mmsae score runs/evidence --control runs/evidence_random", places=("evidence",)),
    "convert": Command(
        "mmsae.interop.command:convert", "turn another library's checkpoint into an SAE folder, and back",
        "mmsae convert openclip_ViT-B-32_VL_SAE_256_8_best.pth vl_sae", places=("src", "dst")),
    "push": Command(
        "mmsae.hub.command:push", "upload an SAE to the Hugging Face hub, with its figures in the card",
        "mmsae push runs/paired/sae me/sae --licence apache-2.0", True),
    "pull": Command(
        "mmsae.hub.command:pull", "bring an SAE from the Hugging Face hub",
        "mmsae pull me/sae --revision v1 --out sae", True),
}
# fmt: on

SHARDS = ("shards", "val_shards", "train", "val", "calibration", "target")
"""Arguments of datamodules and of jobs of ``mmsae predict`` that name one set of shards or several."""

# lines in which jsonargparse lists types that it tried in vain
_NO_REASON = r"Does not validate|Subtypes:|Errors:|- Expected a <class 'NoneType'>|Given value"

COMPUTES = {"device", "devices", "host", "steps"}
"""Options of the commands that cannot do without torch."""

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "dict": "a mapping"}

USAGE = """usage: mmsae COMMAND [options]      (mmsae COMMAND --help explains every option)

Train:
  fit             train an SAE: mmsae fit -c configs/train/paired_topk_store.yaml --data.store STORE
  validate, test, predict   run a trained one over data (Lightning)

Other commands:
{others}

MMSAE_TRACEBACK=1 in the environment shows where an error came from.
"""

RENAMED = {"allow-tap-mismatch": "allow-other-site"}
"""Options that had another name; who gives the old one is told the new."""


def command_parser(name: str) -> tuple[ArgumentParser, Callable]:
    """The parser of a plain command, and the function that it calls.

    Options are written with dashes, as in ``--image-size``; the underscores of YAML and Python are understood too.
    """
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def parse_args(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:
            place = next((a.dest for a in self._actions if not a.option_strings and _takes(a)), "")
            known = {**self._option_string_actions, **{a.dest: a for a in self._actions if a.dest == place}}
            args = sys.argv[1:] if args is None else args
            return super().parse_args(one_form(args, lambda option: _takes(known.get(option)), place), **kwargs)

        def format_help(self) -> str:
            text = super().format_help().replace("``", "`").rstrip()
            return f"{text}\n\nexample:\n  {command.example}\n"

    command = COMMANDS[name]
    module, function = command.target.split(":")
    fn: Callable = getattr(import_module(module), function)
    parser = Parser(prog=f"mmsae {name}", description=command.summary, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below")
    several = groups(fn)
    parser.add_function_arguments(fn, as_group=False, as_positional=command.positional, skip=set(several))
    own = {a.dest for a in parser._actions} | {n for group in several.values() for n in names(group)}
    for at, group in several.items():
        add_group(parser, group, default_of(fn, at))
    for group in [Process] * ("threads" not in own) + [HostOptions] * ("host" in own):
        add_group(parser, group)
    for action in parser._actions:
        _adapt(parser, action)
        if action.dest in command.places:
            for name in action.option_strings:
                parser._option_string_actions.pop(name)
            action.option_strings, action.nargs, action.metavar = [], "?", action.dest.upper()
    needed = [f"{a.option_strings[0]} {a.dest.upper()}" if a.option_strings else a.dest.upper()
              for a in parser._actions if a.required or a.dest in command.places]  # fmt: skip
    parser.usage = " ".join(["%(prog)s", *needed, "[-c FILE] [options]"])
    return parser, fn


def _adapt(parser: ArgumentParser, action: Action) -> None:
    """Dashes for underscores, flags without a value, and several values side by side."""
    if action.dest != "print_config":  # jsonargparse looks for that very name
        spelled = [s.replace("_", "-") for s in action.option_strings]
        parser._option_string_actions.update(dict.fromkeys(spelled, action))
        action.option_strings = [s for s in spelled if not s.endswith("+")]
    if getattr(action, "_typehint", None) is bool:
        action.nargs, action.const = "?", "true"  # --verify is --verify true
    if (several := get_origin(getattr(action, "_typehint", None))) in (list, tuple):
        action.nargs, action._typehint = "+", get_args(action._typehint)[0]  # --k 4 8 16
        action.metavar = action.dest.upper()
        if several is tuple and action.default is not None:
            parser.set_defaults({action.dest: list(action.default)})


def one_form(args: Sequence[str], takes: Callable[[str], str], place: str = "") -> list[str]:
    """Arguments in which every option that takes several values stands once, with all of them.

    They may be given one after the other (``--shards A B``, which an unquoted glob becomes), by saying the option again
    (``--shards A --shards B``) or as a list (``--shards "[A, B]"``). An option ``takes`` ``many`` values of
    one type; ``either`` one or a list, written as JSON; or neither. First arguments without a name are ``place``.
    """
    given: dict[str, list[str]] = {}
    spelled: dict[str, str] = {}  # --val-shards and --val_shards are one option
    out: list[str] = []
    at = place
    for arg in args:
        name, sep, value = arg.partition("=")
        if arg.startswith("-") and not re.fullmatch(r"-[\d.][\d.e+-]*", arg):
            at = spelled.setdefault(name.replace("_", "-"), name) if takes(name) else ""
            if not at:
                out.append(arg)
            else:
                given.setdefault(at, []).extend([value] if sep else [])
        elif at:
            given.setdefault(at, []).append(arg)
        else:
            out.append(arg)
    for name, values in given.items():
        either = takes(name) == "either"
        if either or len(values) == 1:
            values = [v for value in values for v in _listed(value)]
        if either and len(values) > 1:
            values = [json.dumps(values)]
        out = [*values, *out] if name == place else [*out, name, *values]
    return out


def _takes(action: Action | None) -> str:
    """What an option of a plain command takes, see ``one_form``."""
    if any(get_origin(t) is list for t in get_args(getattr(action, "_typehint", None))):
        return "either"
    return "many" if getattr(action, "nargs", None) == "+" else ""


def _takes_in_training(option: str) -> str:
    """The same of Lightning's subcommands, where shards are arguments of datamodules and of jobs."""
    return "either" if re.fullmatch(rf"--(data|model)\.(init_args\.)?({'|'.join(SHARDS)})", option) else ""


def _listed(text: str) -> list[str]:
    """The entries of ``[A, B]``, which may have brackets and commas in brackets; another text is one entry."""
    inside = text.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        return [text]
    entries, depth, quote = [""], 0, ""
    for letter in inside[1:-1]:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        if depth < 0:  # [a]/x[1], a name
            return [text]
        if letter == "," and not depth and not quote:
            entries.append("")
        else:
            entries[-1] += letter
    entries = [e.strip() for e in entries]
    entries = [e[1:-1] if len(e) > 1 and e[0] == e[-1] and e[0] in "'\"" else e for e in entries]
    return [e for e in entries if e] or [text]


def _command(name: str, args: list[str]) -> None:
    from mmsae.recipes import command_args

    parser, fn = command_parser(name)
    values = parser.parse_args(command_args(args)).as_dict()
    values.pop("config", None)
    if COMPUTES & values.keys():
        torch_for_good()
    if values.get("part") == "" and not values["merge"] and values["engine"] == "processes":
        from mmsae.jobs.queue import part_of_array

        values["part"] = part_of_array(os.environ)
    try:
        result = _done(name, fn, values)
    except Exception as e:
        if not out_of_memory(e):
            raise
        wanted = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(e))  # torch goes on for a dozen sentences
        first = str(e) if isinstance(e, InputError) else "no memory is left" + (f" ({wanted[0]})" if wanted else "")
        raise InputError(f"{first.rstrip('.')}: {_less_memory(values)}") from e
    if result is not None:
        print(result["out"] if isinstance(result, Mapping) else result)  # a text, or the path of what it wrote


def _less_memory(values: Mapping[str, Any]) -> str:
    """Which of a command's options would need less memory of a device."""
    ways = []
    if "batch_size" in values:
        ways.append(f"lower --batch-size (now {values['batch_size'] or 'its default'})")
    if values.get("precision") == "fp32":
        ways.append("give --precision bf16")
    if "device" in values and values["device"] != "cpu":
        ways.append("give --device cpu, which is slow")
    return " or ".join(ways) or "another program may hold the memory of the device"


def _done(name: str, fn: Callable, values: dict[str, Any]) -> Any:
    """Call a command's function; what it writes is delivered where its place is a URL."""
    place = next((p for p in ("out", "dst") if isinstance(values.get(p), str) and is_url(values[p])), "")
    if place:
        from mmsae.remote.delivery import delivered

        if values.get("part") not in (None, "", "none") or values.get("merge"):
            raise InputError(f"out is {shown(values[place])}; parts need a folder that all their machines see")
        options = {"command": name, **values}
        wanted = signature(fn).parameters
        return delivered(values[place], options, lambda out: call(fn, **_prepare({**values, place: out}, wanted)))
    return call(fn, **_prepare(values, signature(fn).parameters))


def _prepare(values: dict[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """Use the threads that are asked for, unless the command does; and put the options of a host into its name."""
    if "threads" in values and "threads" not in wanted:
        take(Process, values).use()
    if "host_options" in values:
        values["host"] = take(HostOptions, values).name(values["host"])
    return values


def _user_error(e: BaseException | None, command: str) -> str | None:
    """The sentence for something that the user gave and that is wrong; None for a fault of the program.

    jsonargparse wraps what a class says about its arguments in an account of all types that it tried.
    """
    while e is not None:
        if isinstance(e, InputError):
            return str(e)
        if isinstance(e, (PermissionError, NotADirectoryError, IsADirectoryError)) and e.filename:
            return f"{e.filename}: {e.strerror}"
        if isinstance(e, ArgumentError):
            if wrong := _wrong_type(str(e), command):
                return f"{wrong} (mmsae {command} --help explains every option)"
            lines = [line.strip() for line in str(e).splitlines()]
            reasons = [line for line in lines[1:] if line and not re.match(_NO_REASON, line)]
            text = " ".join([lines[0], *reasons]).removeprefix("Parser key ")
            new = next((n for old, n in RENAMED.items() if old in text.replace("_", "-")), None)
            renamed = f"; it is --{new} now" if new else ""
            return f"{text}{renamed} (mmsae {command} --help explains every option)"
        e = e.__cause__
    return None


def _wrong_type(said: str, command: str) -> str | None:
    """``--option must be a TYPE, not VALUE`` where that is all that is wrong with it."""
    first, *lines = map(str.strip, said.splitlines())
    key = re.match(r'Parser key "([\w.]+)"', first)
    value = re.search(r"(?:Got|Given) value: (.*)", said)
    plain = rf"{_NO_REASON}|(- )?Expected a (<class|typing\.Literal)"
    if not key or not value or not all(re.match(plain, line) for line in lines):
        return None
    kinds = [_KINDS.get(k, k) for k in re.findall(r"Expected a <class '(\w+)'>", said) if k != "NoneType"]
    kinds += [f"one of {k}".replace("'", "") for k in re.findall(r"Expected a typing\.Literal\[(.*?)\]", said)]
    option = key[1] if command in LIGHTNING else key[1].replace("_", "-")
    return f"--{option} must be {' or '.join(kinds)}, not {value[1]!r}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 and one sentence on stderr when the input is wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(others="\n".join(f"  {n:15s} {c.summary}" for n, c in COMMANDS.items())))
        return
    if args[0] in ("-V", "--version"):
        from mmsae import __version__

        print(f"mmsae {__version__}")
        return
    keep_memory()
    plain_warnings()
    try:
        if args[0] in LIGHTNING and args[1:] in (["-h"], ["--help"]):
            from mmsae.training.help import text

            print(text(args[0]))
        elif args[0] in LIGHTNING:
            torch_for_good()
            with uncollected():
                from mmsae.training.cli import run

            args = args[:-1] if args[-2:] in (["-h", "all"], ["--help", "all"]) else args

            run([args[0], *one_form(args[1:], _takes_in_training)])
        elif args[0] in COMMANDS:
            _command(args[0], args[1:])
        else:
            raise InputError(f"no command {args[0]!r}; there are {', '.join((*LIGHTNING, *COMMANDS))}")
    except BrokenPipeError:  # the reader of our output has seen enough, as in `mmsae info X | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as e:
        message = _user_error(e, args[0])
        if message is None:
            raise
        if os.environ.get("MMSAE_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exception(e)
        print(f"mmsae: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

"""The fenced blocks of the documents, and a way to run each at the size of a test."""

import contextlib
import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))


def name(document):
    """A document's path within the repository, which is its test's name."""
    return document.relative_to(ROOT).as_posix()


EVALUATE = (
    "--trainer.accelerator cpu --data.batch_size 16 --trainer.enable_progress_bar false "
    "--model.sae.init_args.ratio 2 --model.sae.init_args.selector.init_args.k 4"
)
#: What is appended to a documented command, so that it takes seconds. The rest of it runs as it is written.
SMALLER = {
    "pretrain-clip": "--steps 3 --batch-size 16 --progress false",
    "extract": "--batch-size 16 --workers 0 --progress false",
    "fit": "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.accelerator cpu --data.batch_size 16 "
    "--trainer.enable_progress_bar false --model.sae.init_args.ratio 2 --model.sae.init_args.selector.init_args.k 4",
    "validate": EVALUATE,
    "test": EVALUATE,
    "evidence": "--batch-size 16 --workers 0 --min-items 4 --progress false",
    "analyse": "--min-items 2",
    "explore": "--layout pca --progress false",
    "name": "--min-items 1 --progress false",
    "score": "--progress false",
    "scenarios": "--unnamed true --dense 1 --progress false",
    "filter": "",
    "status": "",
    "info": "",
    "convert": "",
}
#: Commands that other tests run; here their arguments are parsed only.
ELSEWHERE = {"demo": "tests/demo/test_command.py", "bench": "tests/bench/test_world_filter.py"}
#: Replacements in Python blocks.
FEWER = {"5000": "60", "800, per_shard=100": "32, per_shard=4"}


class Block(NamedTuple):
    """One fenced block: its language, text and first line, and why it is not run (empty: it is)."""

    document: Path
    line: int
    language: str
    text: str
    skipped: str

    def __str__(self):
        return f"{self.document.name}:{self.line}"


def blocks(document):
    """The blocks of a document. ``<!-- not run: WHY -->`` above a block says that its commands are only parsed."""
    lines, found, i = document.read_text().splitlines(), [], 0
    while i < len(lines):
        if fence := re.fullmatch(r"```(\w*)", lines[i]):
            end = lines.index("```", i + 1)
            why = re.fullmatch(r"<!-- not run: (.+) -->", lines[i - 1]) if i else None
            text = "\n".join(lines[i + 1 : end])
            found.append(Block(document, i + 1, fence[1], text, why[1] if why else ""))
            i = end
        i += 1
    return found


def commands(block):
    """The commands of a shell block as lists of words, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words, skipped):
    """Run one documented command, or see that it would be accepted."""
    program, *args = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(args) <= set(targets), f"the Makefile has no target {args}"
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(args))
        text = (ROOT / "pyproject.toml").read_text()
        assert args[0] == "install" and all(re.search(rf"^{e} = \[", text, re.M) for e in extras)
    elif program == "python":
        script = args[1].replace(".", "/") + ".py" if args[0] == "-m" else args[0]
        assert (ROOT / script).is_file(), f"no script {script}"
    else:
        assert program == "mmsae", f"a document shows {words}, which nothing checks: teach tests/helpers/doc_blocks.py"
        run_mmsae(args, skipped or args[0] in ELSEWHERE)


def run_mmsae(args, parse_only):
    """Run an ``mmsae`` command in this process, smaller; or parse it and build what it configures, without loading."""
    from mmsae.cli import LIGHTNING, command_parser, main
    from mmsae.recipes import command_args

    name = args[0]
    if not parse_only:
        smaller = SMALLER[name].split()
        if "--ckpt_path" in args and name == "fit":
            smaller[1] = "6"  # two steps more than the run that it goes on with
        if any("synthetic" in a or "smoke" in a for a in args):
            smaller += ["--data.pairs", "64", "--data.val_pairs", "32"]
        with contextlib.suppress(SystemExit) if "--help" in args else contextlib.nullcontext():
            main([*args, *smaller])
    elif name in LIGHTNING:
        from mmsae.recipes import find_recipe
        from mmsae.training.cli import build_cli, build_job, names_a_module

        assert "--ckpt_path" not in args
        found = [find_recipe(a) if before == "-c" else a for before, a in itertools.pairwise(args)]
        (build_job if names_a_module(found) else build_cli)(found, run=False)
    else:
        command_parser(name)[0].parse_args(command_args(args[1:]))


def run_block(block, namespace):
    """Run one block; Python blocks of a document share a namespace."""
    if block.language == "bash":
        for words in commands(block):
            run_command(words, block.skipped)
    elif block.language == "python":
        text = block.text
        for old, new in FEWER.items():
            text = text.replace(old, new)
        code = compile("\n" * block.line + text, str(block.document), "exec")
        if not block.skipped:
            exec(code, namespace)
    elif block.language == "yaml":
        import yaml

        assert yaml.safe_load(block.text) is not None
    else:
        assert block.language in ("text", "json", "mermaid"), f"{block}: a fence needs a language"


def run_document(document):
    """Run all blocks of a document in the working folder; returns the namespace of its Python blocks."""
    namespace = {"__name__": "__main__"}
    for block in blocks(document):
        try:
            run_block(block, namespace)
        except BaseException as e:
            raise AssertionError(f"{block} does not run: {type(e).__name__}: {e}\n{block.text}") from e
    return namespace

"""Help costs little: no parser imports what computes."""

import subprocess
import sys

from mmsae.cli import COMMANDS, LIGHTNING

HEAVY = (
    "torch torchmetrics lightning transformers diffusers open_clip timm pandas pyarrow matplotlib sklearn scipy PIL "
    "webdataset huggingface_hub"
).split()


def imported(code):
    """The lines of what a new Python says that name modules; ``heavy()`` gives those of HEAVY that are imported."""
    head = f"import os, sys\ndef heavy(): return [m for m in {HEAVY} if m in sys.modules]\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.endswith("[]")]


def test_no_parser_imports_what_computes():
    code = f"""
from mmsae.cli import command_parser
for name in {list(COMMANDS)}:
    command_parser(name)[0].format_help()
    print(name, heavy())
"""
    assert imported(code) == []


def test_short_help_of_training_and_the_description_of_an_sae_import_nothing_heavy():
    code = f"""
from mmsae.cli import main
for args in {[*([n, "--help"] for n in LIGHTNING), ["info", "tests/before/files/sae/shared"]]}:
    sys.stdout = open(os.devnull, "w")
    main(args)
    sys.stdout = sys.__stdout__
    print(args, heavy())
"""
    assert imported(code) == []

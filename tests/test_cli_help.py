"""Help costs little: no parser imports what computes."""

import subprocess
import sys

from mmsae.cli import COMMANDS, LIGHTNING

HEAVY = (
    "torch torchmetrics lightning transformers diffusers open_clip timm pandas pyarrow matplotlib sklearn scipy PIL "
    "webdataset huggingface_hub numpy"
).split()
# Commands whose options are still to be parted from their work; only to become shorter.
YET = set(COMMANDS) - {"convert", "evaluate", "info", "ood", "zeroshot"}


def test_no_parser_imports_what_computes():
    code = f"""
import sys
from mmsae.cli import command_parser
for name in {[n for n in COMMANDS if n not in YET]}:
    command_parser(name)[0].format_help()
    print(name, [m for m in {HEAVY} if m in sys.modules])
    for m in list(sys.modules):
        if m.split(".")[0] in {HEAVY}:
            del sys.modules[m]
"""
    assert fresh(code) == []


def test_short_help_of_training_and_the_description_of_an_sae_import_nothing_heavy():
    code = f"""
import sys
from mmsae.cli import main
for args in {[*([n, "--help"] for n in LIGHTNING), ["info", "tests/before/files/sae/shared"]]}:
    sys.stdout = open("/dev/null", "w")
    main(args)
    sys.stdout = sys.__stdout__
    print(args, [m for m in {[m for m in HEAVY if m != "numpy"]} if m in sys.modules])
"""
    assert fresh(code) == []


def fresh(code):
    """The lines of a new Python that name modules."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.endswith("[]")]

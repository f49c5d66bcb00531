"""Help costs little: no parser imports what computes."""

import subprocess
import sys

from mmsae.cli import COMMANDS

HEAVY = (
    "torch torchmetrics lightning transformers diffusers open_clip timm pandas pyarrow matplotlib sklearn scipy PIL "
    "webdataset huggingface_hub numpy"
).split()
# Commands whose options are still to be parted from their work; only to become shorter.
YET = set(COMMANDS)


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.endswith("[]")] == []

"""``python -m mmsae`` is the command ``mmsae``."""

from mmsae.cli import main

main()

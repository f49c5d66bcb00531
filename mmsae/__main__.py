"""``python -m mmsae`` is the command ``mmsae``."""

from mmsae.cli import main

if __name__ == "__main__":
    main()

"""Parts of ``mmsae demo`` that run as processes of their own and end with the one that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


class SideProcess:
    """``python -m MODULE ROOT PROFILE SEED`` with one thread, its output in a log.

    Args:
        module: With ``if __name__ == "__main__": main(run)``.
        log: File for what it prints.
        what: What it is, for errors: "the ... part of the demo".
        root: Folder of the demo.
        profile: Its name.
        seed: Of the models.
    """

    def __init__(self, module: str, log: Path, what: str, root: Path, profile: str, seed: int):
        self.log, self.what = log, what
        args = [sys.executable, "-m", module, str(root), profile, str(seed)]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                args, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def wait(self) -> None:
        """Until it is done.

        Raises:
            RuntimeError: It failed; with the end of its log.
        """
        if self.process.wait():
            end = "\n".join(self.log.read_text().splitlines()[-12:])
            raise RuntimeError(f"the {self.what} part of the demo failed (all of it in {self.log}):\n{end}")

    def stop(self) -> None:
        """End it, if it runs."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def main(run: Callable[[Path, str, int], None]) -> None:
    """What such a module does when it is started: ``run(root, profile, seed)``, until the parent ends."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))


def _end_with_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)  # the demo was killed: whoever starts it again must not meet this process

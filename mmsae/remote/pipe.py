"""What a command writes to its standard output, if it ends well."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from typing import BinaryIO

from mmsae.files import cache_folder, disk_errors
from mmsae.remote.retry import MayPass, retried
from mmsae.remote.urls import PIPE

TRIES = 3


def piped(url: str) -> BinaryIO:
    """The output of ``pipe:COMMAND``, whole, as an open file that is gone when it is closed.

    The command runs in a shell, in which each part of a pipeline must end well.

    Raises:
        InputError: It ended with another status than 0, every time it was tried.
    """
    return retried(url, lambda: _run(url.removeprefix(PIPE)), TRIES)


def _run(command: str) -> BinaryIO:
    shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        file = tempfile.TemporaryFile(dir=folder)
    try:
        done = subprocess.run([*shell, command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise MayPass(f"the command ended with status {done.returncode}{': ' + said[-1][:200] if said else ''}")
        file.seek(0)
        return file
    except BaseException:
        file.close()
        raise

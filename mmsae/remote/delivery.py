"""Results that belong elsewhere: made on this machine, then written there whole, with the mark of the finished last.

Where a folder is under way, ``uploading.json`` says whose it is; ``uploaded.json``, which lists all files and their
sizes, says that it is whole. A job that is killed goes on with what it has on this machine. A single file is whole or
not there by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmsae.errors import InputError
from mmsae.files import cache_folder
from mmsae.remote import systems
from mmsae.remote.retry import MayPass, retried
from mmsae.remote.urls import check_url, file_name, scheme_of, shown

BEGUN, DONE = "uploading.json", "uploaded.json"
MARKS = ("spec.json", "cfg.json", "results.json", "weights.json", "job.json", "members.json")
"""Files by which a finished result is known: written after the others."""
SINGLE = (".csv", ".html", ".json", ".jsonl", ".npy", ".npz", ".parquet", ".safetensors", ".tsv", ".txt", ".yaml")
"""Ends of names of results that are one file."""
HOW = ("progress", "workers", "threads", "devices", "engine", "gpus", "retries", "part", "merge", "run")
"""Options that do not change a result."""


def delivered(out: str, options: Mapping[str, Any], work: Callable[[str], Any]) -> str:
    """Do some work that writes a result, and write that to a URL.

    Args:
        out: The URL of the result: a folder that is empty or not there, or holds what this very job has begun.
        options: What the work is asked to do, by which it is known again; plain values.
        work: Makes the result at the path on this machine that it is given.

    Returns:
        The URL.

    Raises:
        InputError: Nothing can be written there, there is another result, or the transfer failed every time. What was
            made is kept on this machine then, and the same command goes on.
    """
    out = check_url(out).rstrip("/")
    if scheme_of(out) in ("http", "https", "pipe"):
        raise InputError(f"{shown(out)} cannot be written; results go to folders here, to s3://, gs:// and their like")
    job, single = _job(options), file_name(out).lower().endswith(SINGLE)
    if not single and _begin(out, job):
        print(f"{shown(out)}: finished before; nothing to do")
        return out
    folder = cache_folder() / "results" / blake2b(out.encode(), digest_size=8).hexdigest()
    made = folder / (file_name(out) or "result")
    if made.parent.exists() and _json(folder / BEGUN) != {"job": job}:
        shutil.rmtree(folder)  # what another job left, which was never finished there
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN).write_text(json.dumps({"job": job}))
    work(str(made))
    if single:
        _put(made, out)
    else:
        _put_folder(made, out, job)
        retried(shown(out), lambda: systems.remove(f"{out}/{BEGUN}"))
    shutil.rmtree(folder)
    return out


def _begin(out: str, job: str) -> bool:
    """Mark the place, which also shows that it can be written; whether the result of this very job is there already."""
    there = _names(out)
    if DONE in there:
        if json.loads(_text(f"{out}/{DONE}")).get("job") == job:
            return True
        raise InputError(f"{shown(out)} holds the result of another job; choose another --out")
    if BEGUN in there:
        if json.loads(_text(f"{out}/{BEGUN}")).get("job") != job:
            raise InputError(f"{shown(out)} holds the unfinished result of another job; choose another --out")
        return False
    if there:
        raise InputError(f"{shown(out)} holds other files, such as {sorted(there)[0]}; choose another --out")
    _write(f"{out}/{BEGUN}", json.dumps({"job": job}))
    return False


def _put_folder(made: Path, out: str, job: str) -> None:
    files = {p.relative_to(made).as_posix(): p for p in made.rglob("*") if p.is_file()}
    if not files:
        raise InputError(f"nothing was made that could be written to {shown(out)}")
    for name in sorted(files, key=lambda n: (n in MARKS, n)):
        _put(files[name], f"{out}/{name}")
    about = {"job": job, "files": {n: files[n].stat().st_size for n in sorted(files)}}
    _write(f"{out}/{DONE}", json.dumps(about, indent=1))


def _job(options: Mapping[str, Any]) -> str:
    said = {k: v for k, v in options.items() if k not in HOW}
    return blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _put(path: Path, url: str) -> None:
    """Write a file to a URL, and see that all of it is there."""

    def once() -> None:
        systems.upload(path, url)
        if (size := systems.find(url).size) != path.stat().st_size:
            raise MayPass(f"{size} of {path.stat().st_size} bytes arrived")

    retried(shown(url), once)


def _write(url: str, text: str) -> None:
    retried(shown(url), lambda: systems.write(url, text.encode()))


def _text(url: str) -> str:
    return retried(shown(url), lambda: systems.read(url)).decode()


def _names(url: str) -> set[str]:
    return retried(shown(url), lambda: systems.names(url))

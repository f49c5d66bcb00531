"""Files of object stores and hubs, through fsspec: ``s3://``, ``gs://``, ``hf://``, and whatever else it knows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsae.errors import InputError
from mmsae.remote.http import refuse_changed
from mmsae.remote.retry import MayPass
from mmsae.remote.urls import Remote, scheme_of, shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""What reads a scheme, for who lacks it."""
TAGS = ("ETag", "etag", "blob_id", "md5Hash", "md5", "checksum")
"""What tells the version of a file, best first."""
TIMES = ("LastModified", "mtime", "updated", "created")
"""What does where there is nothing better."""

_CREDENTIALS = ("credential", "accessdenied", "access denied", "forbidden", "401", "403", "gated", "unauthorized",
                "invalidaccesskeyid", "signaturedoesnotmatch", "anonymous caller")  # fmt: skip
_MISSING = ("nosuchbucket", "nosuchkey", "not found", "404", "does not exist")


def system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it.

    Raises:
        InputError: The package that reads it is missing, or nobody knows the scheme.
    """
    scheme = scheme_of(url)
    try:
        import fsspec

        found = fsspec.filesystem(scheme)
    except ImportError as e:
        package = PACKAGES.get(scheme) or str(e).removeprefix("Install ").split(" ")[0]
        raise InputError(
            f"{shown(url)} needs the package {package}, which is not installed: pip install 'mmsae[remote]'"
        ) from e
    except ValueError as e:
        raise InputError(
            f"{shown(url)}: {scheme}:// is no place that can be read; there are s3, gs, hf and https"
        ) from e
    return found, found._strip_protocol(url)


def find(url: str) -> Remote:
    """Size and version of a file.

    Raises:
        InputError: It is not there, or there are no credentials for it.
        MayPass: The store failed.
    """
    files, path = system(url)
    with _told(url):
        files.invalidate_cache()
        return _remote(url, files.info(path))


def listed(pattern: str, deep: bool = False) -> list[Remote]:
    """The files that a glob matches, or of a folder; with ``deep`` those of the folders below too. Sorted by name.

    Raises:
        InputError: The bucket is not there, or there are no credentials for it.
        MayPass: The store failed.
    """
    files, path = system(pattern)
    with _told(pattern):
        files.invalidate_cache()
        if any(c in path for c in "*?["):
            found = files.glob(path, detail=True)
        elif deep:
            found = files.find(path, detail=True)
        else:
            found = {i["name"]: i for i in files.ls(path, detail=True)}
        whole = {name: i for name, i in found.items() if i.get("type") == "file"}
        return [_remote(files.unstrip_protocol(name), whole[name]) for name in sorted(whole)]


def download(remote: Remote, path: str) -> None:
    """Write the file to a path on this machine, whose size the caller checks.

    Raises:
        InputError: It is not there any more, or has changed since it was found.
        MayPass: The store failed, or the transfer was cut.
    """
    files, place = system(remote.url)
    with _told(remote.url):
        files.invalidate_cache()
        refuse_changed(remote, _remote(remote.url, files.info(place)))
        files.get_file(place, path)
    if (got := os.path.getsize(path)) != remote.size:
        raise MayPass(f"the transfer was cut after {got} of {remote.size} bytes")


def tail(remote: Remote, n: int) -> bytes:
    """The last ``n`` bytes.

    Raises:
        MayPass: The store failed.
    """
    files, place = system(remote.url)
    with _told(remote.url):
        return files.cat_file(place, start=max(0, remote.size - n), end=remote.size)


def upload(path: Path, url: str) -> None:
    """Write a file of this machine to a URL; see :func:`find` for errors."""
    files, place = system(url)
    with _told(url, "write"):
        files.put_file(str(path), place)


def write(url: str, data: bytes) -> None:
    """Write a small file."""
    files, place = system(url)
    with _told(url, "write"):
        files.pipe_file(place, data)


def read(url: str) -> bytes:
    """Read a small file."""
    files, place = system(url)
    with _told(url):
        return files.cat_file(place)


def remove(url: str) -> None:
    """Remove a file."""
    files, place = system(url)
    with _told(url, "write"):
        files.rm_file(place)


def names(url: str) -> set[str]:
    """Names of what is in a folder; empty where there is none."""
    files, place = system(url)
    with _told(url):
        files.invalidate_cache()
        try:
            return {i["name"].rstrip("/").rpartition("/")[2] for i in files.ls(place, detail=True)}
        except FileNotFoundError:
            return set()


def _remote(url: str, info: dict[str, Any]) -> Remote:
    if info.get("type") == "directory":
        raise InputError(f"{shown(url)} is a folder, not a file")
    tag = next((str(info[t]) for t in TAGS if info.get(t)), "")
    tag = tag or next((_moment(info[t]) for t in TIMES if info.get(t)), "")
    return Remote(url, int(info.get("size") or 0), tag)


def _moment(time: Any) -> str:
    """A time in one form: stores give it in several, in a list of files another than for one of them."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            return time
    return f"{time.timestamp() if isinstance(time, datetime) else float(time):.3f}"


@contextmanager
def _told(url: str, verb: str = "read") -> Iterator[None]:
    """Errors of a store as ours: what will not change is an InputError, the rest may pass."""
    try:
        yield
    except (InputError, MayPass):
        raise
    except FileNotFoundError as e:
        raise InputError(f"{shown(url)} does not exist: there is no such file, folder or bucket") from e
    except Exception as e:  # each store raises errors of its own library
        said = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"
        if isinstance(e, PermissionError) or any(word in said.lower() for word in _CREDENTIALS):
            raise InputError(
                f"{shown(url)}: no credentials in the environment, or none that may {verb} it ({said})"
            ) from e
        if any(word in said.lower() for word in _MISSING):
            raise InputError(f"{shown(url)} does not exist ({said})") from e
        raise MayPass(said) from e

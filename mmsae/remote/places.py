"""Any file that lies elsewhere: found, listed and brought here by what knows its scheme."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmsae.errors import InputError
from mmsae.files import disk_errors
from mmsae.remote.retry import retried
from mmsae.remote.urls import Remote, check_url, scheme_of, shown

ASKED_AT_ONCE = 16
"""Requests for sizes that are under way at once."""


def find(urls: Sequence[str]) -> list[Remote]:
    """Size and version of files, in their order.

    Raises:
        InputError: One is not there, cannot be read, or holds a secret; the first of them is named.
    """
    for url in urls:
        check_url(url)
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, max(1, len(urls)))) as pool:
        return list(pool.map(_find, urls))


def listed(pattern: str, deep: bool = False) -> list[Remote]:
    """The files that a glob matches, or of a folder (with ``deep`` also of those below), sorted by name.

    Raises:
        InputError: There is no such place, or none that can be listed.
    """
    check_url(pattern)
    if _is_web(pattern):
        raise InputError(
            f"{shown(pattern)} cannot be listed, as no web server can: name its files, with braces as in "
            "{000..019}.tar"
        )
    from mmsae.remote import systems

    return retried(shown(pattern), lambda: systems.listed(pattern, deep))


def bring(remote: Remote, path: Path) -> None:
    """Write a file to a path on this machine, whole and on the disk; a cut transfer is tried again from its beginning.

    Raises:
        InputError: It has changed, is not there any more, or no try brought it whole.
    """

    def once() -> None:
        if _is_web(remote.url):
            from mmsae.remote import http

            with open(path, "wb") as file:
                http.download(remote, file)
                file.flush()
                os.fsync(file.fileno())
        else:
            from mmsae.remote import systems

            systems.download(remote, str(path))
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    with disk_errors(path):
        retried(shown(remote.url), once)


def tail(remote: Remote, n: int) -> bytes | None:
    """The last ``n`` bytes of a file, or None where the place gives no parts of files."""
    if _is_web(remote.url):
        from mmsae.remote import http as place
    else:
        from mmsae.remote import systems as place
    return retried(shown(remote.url), lambda: place.tail(remote, n))


def _find(url: str) -> Remote:
    if _is_web(url):
        from mmsae.remote import http as place
    else:
        from mmsae.remote import systems as place
    return retried(shown(url), lambda: place.find(url))


def _is_web(url: str) -> bool:
    return scheme_of(url) in ("http", "https")

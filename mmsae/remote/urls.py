"""URLs: what is one, what it is called, and that none holds a secret, since URLs are written into results."""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from mmsae.errors import InputError

PIPE = "pipe:"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET = re.compile(r"sig|token|secret|passw|credential|api.?key|access.?key|auth", re.IGNORECASE)
_NAMED = re.compile(r"[^\s'\"|;<>()=]+\.(?:tar|tgz|tzst)(?:\.\w+)?(?=$|[\s'\"|;<>)?#])", re.IGNORECASE)


class Remote(NamedTuple):
    """A file that lies elsewhere, as it was found."""

    url: str  #: Where.
    size: int  #: Bytes.
    tag: str  #: Its ETag, or what else tells its version; empty where the place says nothing.


def is_url(text: str) -> bool:
    """Whether this names something that lies elsewhere: ``s3://...``, ``https://...``, ``pipe:COMMAND``."""
    return text.startswith(PIPE) or (bool(_URL.match(text)) and not text.startswith("file://"))


def scheme_of(url: str) -> str:
    """``s3``, ``https``, ``pipe``."""
    return "pipe" if url.startswith(PIPE) else url.split("://")[0].lower()


def check_url(url: str) -> str:
    """The URL, if it holds no password and no signature.

    Raises:
        InputError: It does; it would be written into every result that tells where its data is from.
    """
    if scheme_of(url) == "pipe":
        return url
    parts = urlsplit(url)
    if "@" in parts.netloc and scheme_of(url) in ("http", "https", "ftp", "sftp"):
        raise InputError(
            f"{shown(url)} holds a password, which would be written into results: keep it in ~/.netrc and leave it out"
        )
    if found := [k for k, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(k)]:
        raise InputError(
            f"{shown(url)} holds a secret in its query ({found[0]}), which would be written into results: keep the URL "
            "in the environment and read it with 'pipe:curl -sSf \"$NAME\"'"
        )
    return url


def shown(url: str) -> str:
    """A URL for messages: without user, password and query."""
    if scheme_of(url) == "pipe":
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2] if parts.scheme in ("http", "https", "ftp", "sftp") else parts.netloc
    return f"{parts.scheme}://{host}{parts.path}"


def path_of(url: str) -> str:
    """Host or bucket and path, with slashes: what tells two files of one name apart."""
    if scheme_of(url) == "pipe":
        named = _NAMED.findall(url)
        return named[-1].partition("://")[2] or named[-1] if named else f"pipe-{_short(url)}"
    if scheme_of(url) in ("http", "https"):
        parts = urlsplit(url)
        return parts.netloc + parts.path
    return url.split("://", 1)[1]


def file_name(url: str) -> str:
    """The name of the file; for a pipe, the last name of a tar in the command, or a hash of it."""
    return path_of(url).rstrip("/").rpartition("/")[2]


def _short(text: str) -> str:
    return blake2b(text.encode(), digest_size=4).hexdigest()

"""Names of members: what is passed over, what can be written, what can be unpacked."""

from __future__ import annotations

import re

_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own bookkeeping members


def valid_name(name: str) -> str:
    r"""The name of a file as text that can be written.

    Bytes that are not UTF-8 (surrogates in Python's names) become ``\xe9``, and backslashes beside them are doubled:
    names that differ go on to differ.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raw = name.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
        return raw.decode("utf-8", "backslashreplace")
    return name


def is_hidden(name: str) -> bool:
    """Whether a member is none of the data's: hidden files (``._x``, ``.DS_Store``), what macOS and webdataset add."""
    *folders, file = name.split("/")
    return file.startswith(".") or "__MACOSX" in folders or bool(_META.match(name))


def safe_key(key: str) -> str:
    """A key under which a sample can be unpacked: one that leads out of the folder loses its ``..`` and its root."""
    parts = re.split(r"[/\\]", key)
    if parts[0] and ".." not in parts:
        return key
    return "/".join(p for p in parts if p not in ("", ".", ".."))

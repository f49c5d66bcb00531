"""A sample before it is decoded, whatever it was read from."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """An undecoded sample: in a tar, consecutive members of one key."""

    key: str  #: webdataset key.
    raw: dict[str, bytes]  #: ``{field: content}``, fields in lower case.
    sizes: dict[str, int]  #: ``{field: size in bytes}``.
    spelled: dict[str, str]  #: ``{field: the field as the archive spells it}``.
    identified: str = ""  #: What uids are made of where that is not the key.


class ShardCut(Exception):
    """The unit cannot be read further.

    ``kind`` is ``truncated_shard`` (the data ends) or ``broken_shard`` (it is damaged), ``detail`` what was found, and
    ``name`` the member that is cut, where its header could still be read.
    """

    def __init__(self, kind: str, detail: str, name: str = "") -> None:
        super().__init__(detail)
        self.kind, self.detail, self.name = kind, detail, name

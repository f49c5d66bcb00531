"""The sites that a member reads: which there are, and what they are called in a folder and in a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmsae.types import Site

Sites = Mapping[str, str | Site] | str | None  #: As a datamodule takes them; None: its own.


def plain(text: str) -> str:
    """A text with what no folder's name has as ``_``."""
    return re.sub(r"[^\w.+=-]+", "_", text)


def site_word(sites: Mapping[str, str] | str) -> str:
    """Sites as part of a folder's name: ``blocks.3_out_cls`` for ``blocks.3:out[cls]``."""
    given = [sites] if isinstance(sites, str) else sites.values()
    return "+".join(plain(site).strip("_") for site in given)


def choice(sites: Sites) -> str:
    """What a batch calls them."""
    if isinstance(sites, Mapping):
        return ", ".join(f"{m} {s.spec if isinstance(s, Site) else s}" for m, s in sorted(sites.items()))
    return sites or "of the recipe"

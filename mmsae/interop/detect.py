"""An SAE from a path or a hub id, whichever library wrote it."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from mmsae.remote import hub
from mmsae.remote.hub import HubPlace, hub_place
from mmsae.sae import SAE
from mmsae.sae.foreign import MARKS, library_of
from mmsae.types import InputError

LIBRARIES = (
    "saelens", "dictionary_learning", "sparsify", "overcomplete", "visaebench", "saev", "vlsae", "vit_prisma",
    "sdxl_unbox", "saeuron",
)  # fmt: skip
"""What mmsae reads, each by the module of that name, with ``recognise``, ``read`` and ``write``."""
SUFFIXES = (".json", ".yaml", ".yml", ".safetensors", ".pt", ".pth")


def load(path: str | Path, subfolder: str | None = None, revision: str | None = None, **hints: Any) -> SAE:
    """Load the SAE of any library that mmsae reads, frozen and in eval mode; nothing but tensors is unpickled.

    Args:
        path: A folder, a file, or a hub id like ``user/name``.
        subfolder: Folder or file within it.
        revision: Branch, tag or commit of a hub id.
        **hints: What the library's files do not say, by the arguments of its ``read``: ``k``, ``threshold``,
            ``modality``, ``strict``, ``norm_scaling_factor``. None stands for not given.

    Raises:
        InputError: Nothing there, no library that mmsae knows, a hint that this one does not take, or an SAE that
            mmsae cannot express.
    """
    place = locate(path, subfolder, revision)
    library = library_of(place)
    if library is None:
        names = sorted(p.name for p in place.iterdir())[:8] if place.is_dir() else place.name
        raise InputError(f"no library that mmsae reads wrote {place} ({names}); it reads mmsae, {', '.join(LIBRARIES)}")
    given = {name: value for name, value in hints.items() if value is not None}
    if library == "mmsae":
        taken, reader = (), SAE.from_pretrained
    else:
        reader = module(library).read
        taken = tuple(inspect.signature(reader).parameters)[1:]
    if odd := sorted(set(given) - set(taken)):
        raise InputError(f"{place} is of {library}, which takes no {odd[0]} (but {', '.join(taken) or 'nothing'})")
    return reader(place, **given)


def module(library: str) -> Any:
    """The module that reads and writes what a library does.

    Raises:
        InputError: mmsae knows no such library.
    """
    if library not in LIBRARIES:
        raise InputError(f"no library {library!r} is known; mmsae reads {', '.join(LIBRARIES)}")
    return import_module(f"mmsae.interop.{library}")


def locate(path: str | Path, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The folder or file on this machine; one of the hub is downloaded, without what lies beside it.

    Raises:
        InputError: Nothing there, or several SAEs and no ``subfolder`` to choose.
    """
    place = Path(path)
    if place.exists():
        place = place / subfolder if subfolder else place
        if not place.exists():
            raise InputError(f"no {subfolder} in {path}")
        described = place.is_file() and any(fits(place.parent) for fits in MARKS.values())
        return place.parent if described else place  # weights are read with the description that lies beside them
    if place.suffix in SUFFIXES:
        raise InputError(f"no checkpoint file at {path}")
    found = hub_place(str(path), revision, subfolder)
    if found is None:
        raise InputError(f"no SAE at {path}: expected a folder, a file, or a hub id like user/name")
    return _download(found, str(path))


def _download(place: HubPlace, path: str) -> Path:
    try:  # what lies deeper is of other SAEs
        found = hub.brought(place, [f"*{suffix}" for suffix in SUFFIXES], file=True)
        if found.is_file() or (found.is_dir() and any(p.suffix in SUFFIXES for p in found.iterdir())):
            return found
        listed = [PurePosixPath(f) for f in hub.files_of(place)]
    except InputError as e:
        raise InputError(f"no SAE at {path}: it is not here, and {e}") from e
    folders = sorted({str(f.parent) for f in listed if f.suffix in (".safetensors", ".pt", ".pth")})
    where = f"; subfolder may be one of {', '.join(folders[:12])}" if folders else ""
    raise InputError(f"{place.repo} has no SAE in {place.folder or 'its main folder'}{where}")

"""``mmsae push`` and ``mmsae pull``: an SAE folder to the Hugging Face hub, with its figures in the card, and back."""

from __future__ import annotations

import filecmp
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmsae.errors import InputError

BESIDE = (".", "evaluation", "card", "../evaluation", "../card")
"""Folders, from that of the SAE, in which an evaluation of it is looked for."""


def push(
    sae: str,
    repo: str,
    revision: str = "",
    subfolder: str = "",
    private: bool = False,
    licence: str = "",
    results: str = "",
    message: str = "Upload SAE",
) -> str:
    """Upload an SAE folder to the Hugging Face hub, in one commit, with a model card.

    Token and server are those of huggingface_hub (hf auth login, HF_TOKEN, HF_ENDPOINT); neither is written anywhere.

    Args:
        sae: SAE folder.
        repo: OWNER/NAME on the hub, which is made if it is not there.
        revision: Branch, which is made if it is not there. Default: main.
        subfolder: Folder in the repository, for several SAEs in one.
        private: Make the repository private, if it is made; one that is there and public is refused.
        licence: Identifier of the licence for the card, such as apache-2.0.
        results: results.json of mmsae evaluate, or its folder, whose figures stand in the card. Default: one of this
            SAE in its folder, or in a folder evaluation or card there or beside it.
        message: Message of the commit.

    Returns:
        The place, by which every --sae and SAE.from_pretrained know it.
    """
    from mmsae.hub.figures import section
    from mmsae.remote.hub import hub_place
    from mmsae.sae import SAE
    from mmsae.sae import folder as sae_folder
    from mmsae.sae.fingerprint import sae_fingerprint

    place = hub_place(repo, revision, subfolder)
    if place is None:
        raise InputError(f"{repo!r} is no name of a repository on the hub, which is OWNER/NAME")
    folder = sae_folder.read_config(sae)[0]
    model = SAE.from_pretrained(folder)  # so that what is sent can be loaded
    file, found = _results(folder, results, sae_fingerprint(model), model.d_sae)
    print(
        f"mmsae push: {sae} to {place}, " + (f"figures of {file}" if file else "no evaluation in the card"), flush=True
    )
    sae_folder.push(
        folder, place, section(found) if found else "", file.read_bytes() if file else None, licence, private, message
    )
    return str(place)


def pull(repo: str, revision: str = "", subfolder: str = "", out: str = "") -> str:
    """Bring an SAE folder from the Hugging Face hub; it appears when all of it is here.

    A transfer that is cut goes on where it was, several times; after that the same command brings what is missing.
    Commands take an SAE of the hub without this, too: --sae OWNER/NAME@REVISION/FOLDER.

    Args:
        repo: OWNER/NAME on the hub, OWNER/NAME@REVISION/FOLDER, or hf://OWNER/NAME/FOLDER.
        revision: Branch, tag or commit. Default: main.
        subfolder: Folder in the repository.
        out: Folder to write, which may not be there yet. Default: the last name of the repository or folder, here.

    Returns:
        The folder.
    """
    from mmsae.files import atomic_folder, disk_errors, remove_leftovers
    from mmsae.remote.hub import brought, hub_place
    from mmsae.sae import folder as sae_folder

    place = hub_place(repo, revision, subfolder)
    if place is None:
        raise InputError(f"{repo!r} is no place on the hub, as OWNER/NAME or OWNER/NAME@REVISION/FOLDER")
    target = Path(out or (place.folder or place.repo).rpartition("/")[2])
    found = sae_folder.read_config(str(place))[0]
    wanted = (sae_folder.CFG, sae_folder.WEIGHTS, sae_folder.STATE, sae_folder.CARD, sae_folder.RESULTS)
    folder = brought(place, wanted)
    files = [folder / name for name in wanted if (folder / name).is_file()]
    sae_folder.count_parameters(found)  # its header says whether the file is whole
    if target.exists():
        same = filecmp.cmpfiles(folder, target, [f.name for f in files], shallow=False)[0]
        if len(same) == len(files):
            print(f"{target}: brought before; nothing to do")
            return str(target)
        raise InputError(f"{target} is there already: choose another --out, or remove it")
    remove_leftovers(target)
    with disk_errors(target), atomic_folder(target) as temp:
        for file in files:
            shutil.copyfile(file, temp / file.name)
    return str(target)


def _results(folder: Path, given: str, fingerprint: str, d_sae: int) -> tuple[Path | None, dict[str, Any] | None]:
    """The evaluation of this SAE and its file; one that is given and is of another SAE is refused."""
    from mmsae.hub.figures import RESULTS, read_results

    if given:
        file = Path(given) / RESULTS if Path(given).is_dir() else Path(given)
        found = read_results(file)
        # earlier versions did not say whose figures they are but by the number of latents
        if found.get("fingerprint", fingerprint) != fingerprint or found.get("d_sae") != d_sae:
            raise InputError(
                f"{file} is of another SAE ({found.get('sae')}, {found.get('d_sae')} latents), not of {folder}"
            )
        return file, found
    for file in (folder / place / RESULTS for place in BESIDE):
        with suppress(InputError):  # results of another command
            if file.is_file() and (found := read_results(file)).get("fingerprint") == fingerprint:
                return file, found
    return None, None

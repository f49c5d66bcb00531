"""Repositories of models on the Hugging Face hub: places in them by name, what lies there brought here, and written.

Server, cache and token are huggingface_hub's own affair: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` or ``hf auth
login``.
"""

from __future__ import annotations

import glob
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from mmsae.errors import InputError

CARD = "README.md"
_ID = r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)"
_REVISION = r"@(?P<revision>refs/pr/\d+|refs/convert/\w+|[^/@]+)"
_BARE = re.compile(rf"{_ID}({_REVISION}(/(?P<folder>.+))?)?")
_URL = re.compile(rf"hf://(?!(datasets|spaces|buckets|kernels)/){_ID}({_REVISION})?(/(?P<folder>.+))?")


class HubPlace(NamedTuple):
    """A folder of a repository."""

    repo: str  #: ``owner/name``.
    revision: str = ""  #: Branch, tag or commit; empty: the main branch.
    folder: str = ""  #: Folder in it; empty: the main one.

    def __str__(self) -> str:
        return (
            f"hf://{self.repo}{'@' + self.revision if self.revision else ''}{'/' + self.folder if self.folder else ''}"
        )


def hub_place(text: str, revision: str | None = None, subfolder: str | None = None) -> HubPlace | None:
    """The place that a text names: ``OWNER/NAME[@REVISION[/FOLDER]]`` or ``hf://OWNER/NAME[@REVISION][/FOLDER]``.

    A slash in a revision is written ``%2F``, but for ``refs/pr/N``. None where the text has another form.

    Raises:
        InputError: Revision or folder are given twice.
    """
    found = _URL.fullmatch(text.rstrip("/")) or _BARE.fullmatch(text)
    if found is None:
        return None
    said = HubPlace(found["repo"], unquote(found["revision"] or ""), (found["folder"] or "").strip("/"))
    given = {"revision": revision or "", "folder": (subfolder or "").strip("/")}
    for name, value in given.items():
        if value and getattr(said, name):
            raise InputError(f"{text} names a {name}, and so does {'revision' if name == 'revision' else 'subfolder'}")
    return said._replace(**{name: value for name, value in given.items() if value})


def brought(place: HubPlace, patterns: Sequence[str], file: bool = False) -> Path:
    """The files of a place that patterns match, without those of folders below, in huggingface_hub's cache.

    A transfer that is cut goes on where it was, several times; files that are whole are kept whatever becomes of the
    others. Where the hub cannot be reached, what is in the cache is taken.

    Args:
        place: The place.
        patterns: Of names, as ``*.json``.
        file: Whether the place may be a file itself.

    Returns:
        The folder, which need not be there.

    Raises:
        InputError: No such repository or revision, none that may be read, or no hub.
    """
    from huggingface_hub import snapshot_download

    at = f"{glob.escape(place.folder)}/" if place.folder else ""
    wanted = [at + p for p in patterns] + [at[:-1]] * (file and bool(at))
    with told(place):  # "*" of these patterns goes through folders
        root = snapshot_download(
            place.repo, revision=place.revision or None, allow_patterns=wanted, ignore_patterns=[f"{at}*/*"]
        )
    return Path(root) / place.folder


@contextmanager
def or_cache() -> Iterator[str]:
    """While the hub cannot be reached, its libraries take what is in the cache, or fail at once.

    By themselves they try each file for half a minute, and say nothing meanwhile.

    Yields:
        Why it cannot be reached; empty where it can, or where nobody is to ask (``HF_HUB_OFFLINE``).
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    why = "" if before else _unreached(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = before or bool(why)
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


def _unreached(endpoint: str) -> str:
    """Why a server does not answer, asked twice; whatever it answers, it is there."""
    from huggingface_hub.utils import get_session

    for wait in (1.0, 0.0):
        try:
            get_session().head(endpoint, timeout=5)
        except Exception as e:
            if not _of_connection(e):
                raise
            why = type(e).__name__
            time.sleep(wait)
        else:
            return ""
    return why


def files_of(place: HubPlace) -> list[str]:
    """All files of the repository, also outside of the place's folder.

    Raises:
        InputError: See :func:`brought`.
    """
    from huggingface_hub import HfApi

    with told(place):
        return HfApi().list_repo_files(place.repo, revision=place.revision or None)


def send(
    files: Mapping[str, Path | bytes],
    place: HubPlace,
    stale: Sequence[str] = (),
    private: bool = False,
    message: str = "Upload SAE",
    token: str | None = None,
) -> str:
    """Write files into a folder of a repository, in one commit: all of them are there, or none.

    Args:
        files: ``{name: file of this machine, or content}``.
        place: Where; repository and branch are made if they are not there.
        stale: Names that are removed there if they are not among the files.
        private: Whether a repository that is made is private.
        message: Of the commit.
        token: Default: huggingface_hub's own.

    Returns:
        The address of the repository.

    Raises:
        InputError: It may not be written, it is public though ``private`` was asked for, or the hub is not reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with told(place, token):
        if CARD in files and not place.folder:
            _check_card(files[CARD], api.endpoint, token)
        url = api.create_repo(place.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(place.repo).private:
            raise InputError(
                f"{place.repo} is there already and public: make it private on the hub, or leave out --private"
            )
        if place.revision:
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        at, revision = f"{place.folder}/" if place.folder else "", place.revision or None
        there = api.list_repo_files(place.repo, revision=revision)
        changes = [CommitOperationAdd(at + n, f if isinstance(f, bytes) else str(f)) for n, f in files.items()]
        changes += [CommitOperationDelete(at + n) for n in stale if n not in files and at + n in there]
        api.create_commit(place.repo, changes, commit_message=message, revision=revision)
    return str(url)


def _check_card(card: Path | bytes, endpoint: str, token: str | None) -> None:
    """Ask the hub about a card's metadata before anything is made there.

    ``ModelCard.validate`` asks huggingface.co in versions before 2, whatever ``HF_ENDPOINT`` says.
    """
    from huggingface_hub.utils import build_hf_headers, get_session

    asked = {"content": (card if isinstance(card, bytes) else card.read_bytes()).decode(), "repoType": "model"}
    answer = get_session().post(f"{endpoint}/api/validate-yaml", json=asked, headers=build_hf_headers(token=token))
    if answer.status_code == 400:
        said = "; ".join(error["message"] for error in answer.json().get("errors", ()))
        raise InputError(f"the hub does not take the first block of {CARD}: {said}")


@contextmanager
def told(place: HubPlace, token: str | None = None) -> Iterator[None]:
    """Errors of the hub as one sentence; none holds a token.

    Raises:
        InputError: What is wrong with the place, with access to it or with the connection.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as e:
        raise InputError(f"{place.repo} is no name of a repository on the hub: {_first(e)}") from e
    except errors.GatedRepoError as e:
        raise InputError(
            f"{place.repo} is gated: ask for access on its page of the hub, and log in ({_who(token)})"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise InputError(
            f"{place.repo} is not on the hub, or is private and not to be seen from here ({_who(token)})"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise InputError(f"{place.repo} has no revision {place.revision!r}{_revisions(place)}") from e
    except errors.LocalEntryNotFoundError as e:
        why = type(e.__cause__).__name__ if e.__cause__ else "no connection"
        raise InputError(f"{place}: the hub cannot be reached ({why}), and the cache has no copy{_AGAIN}") from e
    except errors.HfHubHTTPError as e:
        code = getattr(e.response, "status_code", None)
        if code in (401, 403):
            raise InputError(f"{place}: the hub refuses this ({code}; {_who(token)})") from e
        raise InputError(f"{place}: the hub answers {code}: {_first(e)}") from e
    except Exception as e:
        if not _of_connection(e):
            raise
        if getattr(e, "filename", None) is not None:  # of this machine
            raise
        raise InputError(f"{place}: the connection to the hub failed ({type(e).__name__}){_AGAIN}") from e


def _of_connection(e: Exception) -> bool:
    """Whether an error is one of the network; the library beneath huggingface_hub is another in its versions."""
    return isinstance(e, OSError) or type(e).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")


_AGAIN = "; run the same command again: files that have passed do not pass again"


def _who(token: str | None) -> str:
    from huggingface_hub import get_token

    if token or get_token():
        return "the token that is set does not allow it"
    return "no token is set: hf auth login, or HF_TOKEN"


def _revisions(place: HubPlace) -> str:
    from huggingface_hub import HfApi

    refs = HfApi().list_repo_refs(place.repo)
    names = [r.name for r in (*refs.branches, *refs.tags)]
    return f"; it has {', '.join(names[:12])}"


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]

"""Names of hosts: what kind, which model, which weights, and the options that it is loaded with.

Names: an open_clip architecture with the tag or file of its weights (``ViT-B-32/laion2b_s34b_b79k``), ``hf-hub:ID``,
``local-dir:DIR`` (open_clip's own folder format), ``timm:NAME`` or ``timm:local-dir:DIR`` (timm's folder format),
``transformers:ID-or-FOLDER`` (vision and dual encoders of transformers, :mod:`mmsae.hosts.encoders.families`),
``lvlm:ID-or-FOLDER`` (vision-language models of transformers), ``diffusers:ID-or-FOLDER`` (text-to-image pipelines),
``module:IMPORT.PATH:FUNCTION`` (any model of the user's, :mod:`mmsae.hosts.encoders.module`), ``lite0`` (an
EfficientNet whose weights a package holds, :mod:`mmsae.hosts.encoders.lite0`). A name may end in a JSON object of
options, ``timm:local-dir:DIR {"img_size": 224}``, so that whoever keeps the name can load the very host
again.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmsae.hosts.encoders import lite0
from mmsae.hosts.encoders.families import FAMILIES
from mmsae.hosts.libraries import library
from mmsae.remote.hub import or_cache
from mmsae.types import InputError, Site

KINDS = (
    "lite0, hf-hub:ID, local-dir:DIR, timm:NAME, timm:local-dir:DIR, transformers:ID-or-FOLDER, lvlm:ID-or-FOLDER, "
    "diffusers:ID-or-FOLDER or module:IMPORT.PATH:FUNCTION"
)
_ID_OR_FOLDER = ("transformers", "lvlm", "diffusers")
_TIMM_DIR = "local-dir:"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
# where files lie and who may read them: no property of the host, and a token is nobody else's business
_NOT_KEPT = {"cache_dir", "device_map", "local_files_only", "token", "use_auth_token", "offload_folder", "max_memory"}
# what a name that came with somebody's SAE may ask for: nothing that could load code (trust_remote_code, kernels, ...)
_HARMLESS = {
    "allow_random", "seed", "dtype", "torch_dtype", "variant", "revision", "num_classes", "in_chans", "global_pool",
    "img_size", "dynamic_img_size", "dynamic_img_pad", "patch_size", "reg_tokens", "drop_path_rate", "force_image_size",
    "force_context_length", "force_quick_gelu", "force_patch_dropout", "image_mean", "image_std",
    "image_interpolation", "image_resize_mode", "text_encoder_3", "tokenizer_3",
}  # fmt: skip


class HostName(NamedTuple):
    """A parsed host name."""

    #: ``open_clip``, ``hf-hub``, ``local-dir``, ``timm``, ``transformers``, ``lvlm``, ``diffusers`` or ``module``.
    kind: str
    model: str  #: Architecture, hub id, folder, timm name or ``IMPORT.PATH:FUNCTION``.
    #: Pretrained tag or checkpoint file of an open_clip architecture, or file of a timm one; None if none is named.
    weights: str | None = None

    @property
    def open_clip_name(self) -> str:
        """What open_clip calls it."""
        return self.model if self.kind == "open_clip" else f"{self.kind}:{self.model}"

    @property
    def folder(self) -> Path | None:
        """The folder that it names; None where it names none, or something that may be a hub id."""
        if self.kind == "timm":
            return Path(self.model.removeprefix(_TIMM_DIR)) if self.model.startswith(_TIMM_DIR) else None
        path = Path(self.model)
        return path if self.kind == "local-dir" or (self.kind in _ID_OR_FOLDER and path.exists()) else None


def split_options(name: str) -> tuple[str, dict[str, Any]]:
    """A name without its options, and the options (braces at its end that are no JSON object are refused)."""
    found = re.search(r"(?:^|\s+)(\{.*\})\s*$", name, re.DOTALL)
    if not found:
        return name, {}
    try:
        return name[: found.start()], dict(json.loads(found[1]))
    except (ValueError, TypeError) as e:
        raise InputError(f"host {name!r} ends in options that are no JSON object: {e}.") from e


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """A name that holds ``options``, over those that it held; an empty name stands for a host that is named elsewhere.

    Options that no other machine could use (folders of caches, device maps, tokens), and values that JSON has no form
    for, are left out.
    """
    bare, own = split_options(name)
    kept: dict[str, Any] = {}
    for key, value in {**own, **options}.items():
        value = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        if key not in _NOT_KEPT and _plain(value):
            kept[key] = value
    return f"{bare} {json.dumps(kept, sort_keys=True)}" if kept else bare


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    return value is None or isinstance(value, (str, int, float, bool))


def named_host(host: str | None, sites: Mapping[str, Site], what: str = "the SAE") -> str:
    """The host that is named, or the one that sites hint at, with the options of both.

    A hint that asks for options that could run somebody's code is refused.

    Args:
        host: A name; empty, or options alone, for the host of the sites.
        sites: The sites of an SAE.
        what: Name of the owner of the sites, for the message.
    """
    bare, options = split_options(host or "")
    if bare:
        return host
    hint = next((s.hint for s in sites.values() if s.hint), "")
    if not hint:
        raise InputError(f"{what} does not say on which host it was trained; name it with --host")
    return with_options(trusted(hint, what), options)


def trusted(name: str, what: str) -> str:
    """A name that a file holds, which may not run anybody's code.

    Args:
        name: The name.
        what: Whose file it is, for the message.

    Raises:
        InputError: It names the user's own code, or an option that could load some.
    """
    why = ""
    if name.partition(":")[0] == "module":
        why = "code"
    elif odd := sorted(split_options(name)[1].keys() - _HARMLESS):
        why = f"with option {odd[0]}"
    if why:
        raise InputError(
            f"{what} names host {name!r}, {why}, which is not taken from a file: if you trust it, name the host and "
            "its options yourself, by --host and --host-options"
        )
    return name


def parse(name: str) -> HostName:
    """Parse a host name, without its options.

    An unknown open_clip architecture (with near matches), a missing folder or one of another kind is refused.
    """
    name = split_options(name)[0]
    if name == lite0.NAME:
        return HostName("timm", f"{_TIMM_DIR}{lite0.folder()}")
    kind, sep, rest = name.partition(":")
    if sep and kind == "module":
        if not re.fullmatch(r"[\w.]+:\w+", rest):
            raise InputError(f"host {name!r} is not of the form module:IMPORT.PATH:FUNCTION.")
        return HostName(kind, rest)
    if sep and kind in ("hf-hub", "local-dir", "timm", *_ID_OR_FOLDER):
        return _folder_or_id(name, kind, rest)
    open_clip = library("open_clip")

    known = open_clip.list_models()
    parts = name.split("/")  # OpenAI writes ViT-B/32, open_clip ViT-B-32
    for n in range(len(parts), 0, -1):
        if (model := "-".join(parts[:n])) in known:
            return HostName("open_clip", model, _home("/".join(parts[n:])) or None)
    if (is_a := folder_kind(_home(name))) is not None:
        raise InputError(f"host {name!r} is a folder of {FORMATS[is_a].of}: write {is_a}:{name}.")
    near = difflib.get_close_matches(parts[0], known, n=5, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}" if near else "open_clip.list_models() lists them"
    raise InputError(f"host {name!r} is no open_clip architecture, {KINDS}; {hint}.")


class Format(NamedTuple):
    """How the folders of a kind of hosts look."""

    file: str  #: What they hold.
    of: str  #: Name of the library whose format it is.


#: Formats by what stands before the folder in a host's name.
FORMATS = {
    "local-dir": Format("open_clip_config.json", "open_clip"),
    "diffusers": Format("model_index.json", "diffusers"),
    "timm:local-dir": Format("config.json", "timm"),
    "transformers": Format("config.json", "transformers"),
    "lvlm": Format("config.json", "transformers"),
}


def folder_kind(path: str | Path) -> str | None:
    """Which of :data:`FORMATS` a folder has; None: it is no host."""
    path = Path(path)
    if (path / FORMATS["local-dir"].file).is_file():
        return "local-dir"
    if (path / FORMATS["diffusers"].file).is_file():
        return "diffusers"
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    if "architecture" in config and "model_type" not in config:
        return "timm:local-dir"
    if "model_type" not in config:
        return None
    return "transformers" if config["model_type"] in FAMILIES else "lvlm"


def _timm_file(name: str, rest: str) -> HostName:
    """A checkpoint file of timm, in a folder in timm's format or with the architecture ahead of it."""
    file = Path(_home(rest))
    if file.is_file():
        if folder_kind(file.parent) != "timm:local-dir":
            raise InputError(
                f"host {name!r}: {file.parent} has no config.json of timm; write timm:ARCHITECTURE/{rest}."
            )
        return HostName("timm", f"{_TIMM_DIR}{file.parent}", str(file))
    timm = library("timm")

    model, _, path = rest.partition("/")
    file = Path(_home(path))
    if not timm.is_model(model.partition(".")[0]):
        near = difflib.get_close_matches(model, timm.list_models(), n=5, cutoff=0.5)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise InputError(f"host {name!r}: the file {rest} does not exist, and {model} is no timm architecture{hint}.")
    if not file.is_file():
        raise InputError(f"host {name!r}: the file {file} does not exist.")
    return HostName("timm", model, str(file))


def _lvlm(folder: Path) -> bool:
    """Whether a folder of transformers looks like a vision-language model's: it has two configurations in it."""
    config = json.loads((folder / "config.json").read_bytes())
    return "vision_config" in config and "text_config" in config


def _home(path: str) -> str:
    """``~`` at the beginning, which a shell leaves alone behind a colon, is the home folder."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _folder_or_id(name: str, kind: str, rest: str) -> HostName:
    """A host of a kind that is named by a folder or an id, checked as far as the folder goes."""
    wanted = kind
    if kind == "timm":
        if Path(_home(rest)).is_dir():
            raise InputError(f"host {name!r} names a folder: write timm:local-dir:{rest}.")
        if rest.endswith(_WEIGHTS):
            return _timm_file(name, rest)
        if not rest.startswith(_TIMM_DIR):
            wanted, folder = "", rest
        else:
            wanted, folder = "timm:local-dir", _home(rest.removeprefix(_TIMM_DIR))
            rest = _TIMM_DIR + folder
    else:
        rest = folder = _home(rest)
    if not folder:
        raise InputError(f"host {name!r} names nothing after '{name[:-1] if name.endswith(':') else kind}:'.")
    path = Path(folder)
    if wanted in FORMATS:
        may_be_id = wanted in _ID_OR_FOLDER and not path.is_absolute() and not folder.startswith(".")
        if not path.exists() and not (may_be_id and folder.count("/") <= 1):
            raise InputError(f"host {name!r}: the folder {folder} does not exist.")
        is_a = folder_kind(path)
        if is_a not in (None, wanted) and not (wanted == "transformers" and is_a == "lvlm" and not _lvlm(path)):
            raise InputError(f"host {name!r}: {folder} is a folder of {FORMATS[is_a].of}; write {is_a}:{folder}.")
        if path.exists() and not (path / FORMATS[wanted].file).is_file():
            raise InputError(f"host {name!r}: {path / FORMATS[wanted].file} does not exist.")
    return HostName(kind, rest)


@contextmanager
def loading(name: str, host: HostName, asks: bool = True) -> Iterator[None]:
    """Around a library's own call, and nothing of ours: what it raises is said in one line, as InputError.

    Args:
        name: What the user wrote.
        host: Whose files are read.
        asks: Whether files of the hub are wanted, if the host is no folder or file.
    """
    asks = asks and host.folder is None and not Path(host.weights or "").is_file()
    with or_cache() if asks else nullcontext("") as why:
        try:
            yield
        except InputError:
            raise
        except Exception as e:  # open_clip asserts, and unpicklers raise what they like
            folder, lost, may_be_id = Path(host.model), "", host.kind in _ID_OR_FOLDER
            if may_be_id and not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
                lost = f"the folder {folder} does not exist ({folder.parent} does), and as an id on the hub: "
            lost += f"the hub cannot be reached, {why}; " if why else ""
            raise InputError(f"host {name!r} cannot be loaded: {lost}{reason(e)}") from e


def reason(e: BaseException, most: int = 700) -> str:
    """What an exception says, in one line; with its type where the words alone do not tell what went wrong."""
    said = " ".join(str(e).split())
    if not said or isinstance(e, (AssertionError, LookupError, TypeError, AttributeError)):
        said = f"{type(e).__name__}: {said}".removesuffix(": ")
    return said if len(said) <= most else f"{said[:most]}... ({len(said) - most} more characters)"

"""``mmsae info``: what a path holds, in a few lines."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsae.files import nbytes
from mmsae.remote.hub import hub_place
from mmsae.types import InputError, Site


def _tensors(file: Path) -> dict[str, Any]:
    """What the header of one file of tensors says."""
    from mmsae.sae.tensor_file import described

    said, tensors = described(file)
    beside = f"the SAE folder {file.parent}" if (file.parent / "cfg.json").is_file() else "nothing that mmsae knows"
    return {
        "kind": "file of tensors",
        "metadata": said or "none",
        "tensors": {name: f"{kind} {list(shape)}" for name, (kind, shape) in tensors.items()},
        "numbers": sum(math.prod(shape) for _, shape in tensors.values()),
        "beside": beside,
    }


def _sae(path: str | Path) -> dict[str, Any]:
    """What the folder of an SAE says; its weights are counted, not read, and torch is not imported."""
    from mmsae.sae.folder import count_parameters, read_config

    folder, block = read_config(path)
    return {
        "kind": "SAE",
        "latents": block["d_sae"],
        "widths": block["d_in"],
        "parameters": count_parameters(folder),
        **{slot: block[slot] for slot in ("normaliser", "encoder", "selector", "dictionaries")},
        "sites": {m: str(Site(**s)) for m, s in block["sites"].items()} or "not named",
        "training": block.get("training", {}),
    }


def _host(kind: str, folder: Path, allow_random: bool) -> dict[str, Any]:
    """What a folder of a host holds; one that is large is not loaded."""
    from mmsae.hosts import load_host
    from mmsae.hosts.names import FORMATS

    config = json.loads((folder / FORMATS[kind].file).read_text())
    size = sum(p.stat().st_size for s in ("safetensors", "bin", "pth") for p in folder.rglob(f"*.{s}"))
    name = f"{kind}:{folder}"
    found: dict[str, Any] = {"kind": f"host ({FORMATS[kind].of} folder)", "name": name}
    if kind == "diffusers":
        parts = {k: v[1] for k, v in config.items() if isinstance(v, list) and v[1]}
        found |= {"pipeline": config["_class_name"], "components": parts}
    elif "architecture" in config:
        found["architecture"] = config["architecture"]
    elif "model_type" in config:
        found["architecture"] = ", ".join(config.get("architectures") or [config["model_type"]])
    found["weights"] = nbytes(size)
    if size < 2**29 and kind != "lvlm":  # larger ones take long to load; an LVLM has no site of its own choice
        host = load_host(name, allow_random=allow_random)
        found |= {"fingerprint": host.fingerprint, "sites": {m: str(s) for m, s in host.default_sites().items()}}
    return found


def _results(file: Path) -> dict[str, Any]:
    """Plain figures of a result, and the names of what else is in the file."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise InputError(f"{file} is no result of mmsae: it holds a {type(content).__name__}, not an object")
    plain = {k: v for k, v in content.items() if not isinstance(v, (dict, list))}
    return {"kind": f"result ({file.name})", **plain, "also": ", ".join(k for k in content if k not in plain)}


def _evidence(file: Path) -> dict[str, Any]:
    """What a folder of evidence is of; nothing but its JSON is read."""
    said = json.loads(file.read_text(encoding="utf-8"))
    job, latents = said["job"], said["latents"]
    return {
        "kind": "evidence",
        "sae": job["sae"],
        "host": f"{job['hint']} ({job['host']})",
        "sites": {m: str(Site(**s)) for m, s in job["sites"].items()},
        "items": said["n_items"],
        "items in evidence": said["in_evidence"],
        "latents": {m: {"of": said["d_sae"], **n} for m, n in latents.items()},
        "places": {m: _places(g) for m, g in said["grid"].items()},
        "captions": said["captions"],
        "images": said["images"],
        "embeddings": said["embedder"] or "none",
        "hard negatives": said["hard_negatives"],
        "halves and draws": f"seed {job['seed']}, {job['quantiles']} quantiles x {job['each']}, "
        f"{job['negatives']} negatives of each kind",
        "faults": said["faults"]["counts"] or "none",
        "also": sorted(p.name for p in file.parent.iterdir() if p.is_dir()) or "no names or scores",
    }


def _places(grid: Mapping[str, Any]) -> str:
    map_ = f"{grid['rows']} x {grid['cols']}" if grid["rows"] else f"{grid['places']}"
    return map_ + (f" at {len(grid['steps'])} steps" if grid.get("steps") else "")


def _shards(pattern: str | Sequence[str]) -> dict[str, Any]:
    from mmsae.shards import describe as describe_shards

    return describe_shards(pattern, progress=sys.stderr.isatty())


def describe(path: str | Sequence[str], verify: bool = False, allow_random: bool = False) -> dict[str, Any]:
    """What is at ``path``: an SAE folder, a run, a store, evidence, the folder of a host or image-text shards.

    Raises:
        InputError: Nothing there that mmsae knows.
    """
    if not isinstance(path, (str, os.PathLike)):
        if len(path) > 1:
            return _shards(path)
        (path,) = path
    folder = Path(path)
    if (folder / "cfg.json").is_file() or ("://" in str(path) and hub_place(str(path)) is not None):
        return _sae(path)
    if folder.suffix == ".safetensors" and folder.is_file():
        return _tensors(folder)
    last = folder / "checkpoints" / "last.ckpt"
    resume = f"--ckpt_path last ({last})" if last.is_file() else "no"
    if (folder / "members.json").is_file():
        members = {row.pop("member"): row for row in json.loads((folder / "members.json").read_text())["members"]}
        return {"kind": f"run of {len(members)} SAEs", "resume": resume, "members": members}
    if (folder / "sae" / "cfg.json").is_file():
        return {"kind": "run", "resume": resume, "sae": _sae(folder / "sae")}
    if (folder / "evidence.json").is_file():
        return _evidence(folder / "evidence.json")
    from mmsae.hosts.names import folder_kind

    if (kind := folder_kind(folder)) is not None:
        return _host(kind, folder, allow_random)
    for name in ("results.json", "weights.json"):  # of mmsae filter, pope, chair, patches, evaluate and weights
        if (folder / name).is_file():
            return _results(folder / name)
    if folder.is_dir() and not any(".tar" in p.name.lower() for p in folder.iterdir()):
        from mmsae.activations import describe_store

        if any((folder / name).is_file() for name in ("spec.json", "job.json")):
            return describe_store(folder, verify)
        try:
            return _shards(path)  # tables or loose images
        except InputError:
            raise InputError(
                f"{path} is no SAE (cfg.json), run (sae/), store (spec.json), host (open_clip_config.json, config.json "
                "or model_index.json) or result (results.json, weights.json) and holds no .tar shards, parquet files "
                "or images"
            ) from None
    return _shards(path)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _lines(value: Mapping[str, Any], indent: str = "") -> list[str]:
    out = []
    for key, v in value.items():
        if isinstance(v, Mapping):
            out += [f"{indent}{key}:", *_lines(v, indent + "  ")]
        elif isinstance(v, list | tuple) and v and not all(isinstance(i, int | float) for i in v):
            out += [f"{indent}{key}:", *(f"{indent}  - {i}" for i in v)]
        else:
            out.append(f"{indent}{key}: {_shown(v)}")
    return out


def info(path: str | list[str], verify: bool = False, as_json: bool = False, allow_random_weights: bool = False) -> str:
    """Describe a path.

    Args:
        path: SAE folder or its place on the hub (hf://OWNER/NAME), run folder, activation store, evidence, a host's
            folder (open_clip, timm, transformers, diffusers), a file of tensors (.safetensors), or shards (file,
            folder, glob, brace pattern, or several).
        verify: Hash every file of a store, however large it is.
        as_json: Print JSON.
        allow_random_weights: Describe a host whose files lack weights, too.

    Returns:
        The description.
    """
    found = describe(path, verify, allow_random_weights)
    return json.dumps(found, indent=2, default=str) if as_json else "\n".join(_lines(found))

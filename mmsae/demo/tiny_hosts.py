"""What the demo trains, kept in the user's cache folder: tiny hosts, their shards, activations and SAEs.

Everything is made on first use, with a bar, and found from then on: ``tiny_hosts.clip()`` is the folder of a CLIP.
A folder's name holds a hash of the recipe that it was made by, so another version of a recipe makes a new one. Folders
are whole or absent, and two processes that ask at once wait for each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmsae.demo.stages import METHODS, PROFILES, SEEDS, fit_method
from mmsae.errors import InputError
from mmsae.files import atomic_folder, cache_folder, remove_leftovers
from mmsae.options import call

Split = Literal["train", "test"]

P = PROFILES["default"]
_CLIP = {"pairs": P.train, "data_seed": SEEDS["train"], "steps": P.clip_steps, "seed": 0, "format": 1}
#: What each depends on; its hash is in the folder's name. ``format`` counts changes of the code that change the result.
RECIPES: dict[str, dict[str, Any]] = {
    "shards-train": {"n": P.train, "seed": SEEDS["train"], "format": 2},
    "shards-test": {"n": P.test, "seed": SEEDS["test"], "format": 2},
    "clip": _CLIP,
    "llava": {"images": P.llava_images, "data_seed": SEEDS["train"], "steps": P.llava_steps, "seed": 0, "clip": _CLIP},
    "diffusion": {"pairs": P.train, "data_seed": SEEDS["train"], "steps": P.diffusion_steps, "seed": 0, "format": 1},
    "probe": {"n": 48 * P.probe_steps, "steps": P.probe_steps, "seed": 1000, "format": 1},
    "store-train": {"clip": _CLIP, "n": P.train, "format": 1},
    "store-test": {"clip": _CLIP, "n": P.test, "format": 1},
    **{f"sae-{name}": {"clip": _CLIP, "n": P.train, "steps": P.sae_steps, "seed": 0, "format": 1} for name in METHODS},
}


def path_of(name: str) -> Path:
    """Where something of :data:`RECIPES` is, or will be: ``NAME-HASH``.

    Raises:
        InputError: There is no such recipe.
    """
    if name not in RECIPES:
        raise InputError(f"there is no {name!r} to be made, only {', '.join(RECIPES)}")
    key = hashlib.blake2b(json.dumps([name, RECIPES[name]], sort_keys=True).encode(), digest_size=6).hexdigest()
    return cache_folder() / f"{name}-{key}"


def shards(split: Split = "train") -> Path:
    """Shards of the generated world: 20,000 pairs to train on, 3,000 held-out ones (about 100 and 15 MB)."""
    from mmsae.world.generator.shards import write_world

    def make(target: Path) -> None:
        recipe = RECIPES[f"shards-{split}"]
        with atomic_folder(target) as temp:
            write_world(temp, recipe["n"], recipe["seed"], split)

    return _made(f"shards-{split}", "generated image-text pairs", 10, make)


def clip() -> Path:
    """A CLIP of half a million parameters, trained on the world; loads as ``local-dir:FOLDER``."""
    from mmsae.world.models.command import pretrain_clip

    def make(target: Path) -> None:
        call(pretrain_clip, shards=str(shards()), out=str(target), steps=_CLIP["steps"], seed=_CLIP["seed"])

    return _made("clip", "a tiny CLIP", 45, make)


def llava() -> Path:
    """A LLaVA on the image trunk of :func:`clip`, which answers questions about objects; loads as ``lvlm:FOLDER``."""
    from mmsae.world.models.llava.model import train_llava
    from mmsae.world.models.options import Training

    def make(target: Path) -> None:
        r = RECIPES["llava"]
        train_llava(
            r["images"], str(clip()), str(target), r["data_seed"], training=Training(steps=r["steps"], seed=r["seed"])
        )

    return _made("llava", "a tiny LLaVA", 60, make)


def diffusion() -> Path:
    """A Stable Diffusion of 32 x 32 pixels that draws one object of the world; loads as ``diffusers:FOLDER``."""
    from mmsae.world.models.command import pretrain_diffusion

    def make(target: Path) -> None:
        r = RECIPES["diffusion"]
        call(pretrain_diffusion, shards=str(shards()), out=str(target), steps=r["steps"], seed=r["seed"])

    return _made("diffusion", "a tiny Stable Diffusion", 90, make)


def probe() -> Path:
    """A classifier of what an image shows, to judge generated images; a file for ``WorldProbe.load``."""
    from mmsae.world.measure.probe import train_probe

    def make(target: Path) -> None:
        r = RECIPES["probe"]
        with atomic_folder(target) as temp:
            train_probe(r["n"], r["steps"], r["seed"], progress=True).save(temp / "probe.safetensors")

    return _made("probe", "a classifier of generated images", 15, make) / "probe.safetensors"


def store(split: Split = "train") -> Path:
    """Activation store of a split: the embeddings of :func:`clip`, both modalities."""
    from mmsae.activations import extract

    def make(target: Path) -> None:
        os.replace(extract(f"local-dir:{clip()}", str(shards(split)), _partial(target)), target)

    return _made(f"store-{split}", "activations of generated pairs", 15, make)


def sae(name: str = "paired_topk") -> Path:
    """An SAE on the training store by ``configs/train/world_NAME.yaml``; ``SAE.from_pretrained`` loads the folder."""

    def make(target: Path) -> None:
        fit_method(name, store(), _partial(target), P.sae_steps, RECIPES[f"sae-{name}"]["seed"])
        os.replace(_partial(target), target)

    return _made(f"sae-{name}", f"an SAE by the recipe world_{name}", 15, make) / "sae"


def keep(made: dict[str, Path]) -> None:
    """Put hosts ``{name: folder}`` of the same recipes, made elsewhere, into the cache; those that are there stay.

    A cache that cannot be written is no error, for nothing is lost.
    """
    try:
        for name, source in made.items():
            target = path_of(name)
            with _locked(target):
                if not target.exists():
                    with atomic_folder(target) as temp:
                        shutil.copytree(source, temp, dirs_exist_ok=True)
    except OSError as e:
        print(f"not kept in {cache_folder()} for the notebooks: {e}", file=sys.stderr)


def _partial(target: Path) -> Path:
    """Where a run is until it is whole; the next one goes on from there."""
    return target.with_name(f"{target.name}.partial")


def _made(name: str, what: str, seconds: int, make: Callable[[Path], Any]) -> Path:
    """The folder of a recipe, made if it is not there; whatever is said meanwhile goes to stderr."""
    target = path_of(name)
    if not target.exists():
        with _locked(target), contextlib.redirect_stdout(sys.stderr):
            if not target.exists():
                print(f"Making {what}, once: about {seconds} s on an idle core. It stays in {target}.", flush=True)
                make(target)
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Alone with ``target``, whatever other processes do; what killed ones left beside it is removed."""
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        remove_leftovers(target)
        yield

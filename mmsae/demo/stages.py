"""What the processes of ``mmsae demo`` share: sizes, stages that run once, and training by recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.jobs.stages import StageLog
from mmsae.recipes import find_recipe

METHODS = ("paired_topk", "vl_sae", "shared_topk")


class Profile(NamedTuple):
    """Sizes of a demo."""

    train: int  #: Training samples
    test: int  #: Held-out samples
    clip_steps: int  #: Steps of the CLIP
    sae_steps: int  #: Steps of each SAE
    damaged: int  #: Samples of the set that is filtered
    llava_images: int  #: Images that the LLaVA learns from
    llava_steps: int  #: Steps of the LLaVA
    token_steps: int  #: Steps of the SAEs on its tokens, and on those of the pipeline's text encoder
    talk: int  #: Conversations that the SAE on the LLaVA's tokens is trained on
    questions: int  #: Images that are asked about, two questions each
    diffusion_steps: int  #: Steps of the text-to-image pipeline
    probe_steps: int  #: Steps of the classifier of generated images
    drawn: int  #: Prompts that the pipeline is tried on
    steered: int  #: Prompts that steering is reported on
    controls: int  #: Random directions that steering is compared with
    minutes: float  #: About how long it takes on two cores


PROFILES = {
    "tiny": Profile(8000, 1500, 120, 300, 600, 1000, 40, 40, 400, 40, 25, 25, 12, 6, 2, 1.5),
    "default": Profile(20000, 3000, 400, 800, 2000, 8000, 250, 300, 3000, 300, 500, 250, 90, 36, 8, 5.0),
}
SEEDS = {"train": 1, "test": 2, "damage": 3, "filter": 4, "talk": 5, "talk_test": 6, "ood": 7}  # of the world only


def stage_log(file: Path, recipe: dict[str, Any]) -> StageLog:
    """Stages that are noted in a JSON file; ``recipe`` is what they depend on.

    Raises:
        InputError: The folder holds a demo of another profile, seed or version of the demo.
    """
    from mmsae.jobs.folder import JobFolder

    folder = JobFolder(file.parent, recipe, "mmsae demo", writes=(), file=file.name, key="recipe", holds="a demo")
    return StageLog(folder)


def fit_recipe(recipe: str, run: Path, steps: int, seed: int, progress: bool = True, extra: Sequence[str] = ()) -> None:
    """``mmsae fit`` of ``configs/train/world_RECIPE.yaml``, going on from its last checkpoint if there is one.

    The SAE comes to ``run/sae``; ``extra`` are more command-line arguments.
    """
    from mmsae.training.cli import run as lightning

    args = ["fit", "-c", find_recipe(f"configs/train/world_{recipe}.yaml")]
    args += ["--trainer.default_root_dir", str(run), "--trainer.max_steps", str(steps), "--seed_everything", str(seed)]
    args += ["--trainer.val_check_interval", str(min(200, steps))]
    args += ["--trainer.enable_progress_bar", str(progress).lower(), *extra]
    if (run / "checkpoints" / "last.ckpt").exists():
        args += ["--ckpt_path", "last"]
    lightning(args)


def fit_method(
    name: str, store: Path, run: Path, steps: int, seed: int, progress: bool = True, extra: Sequence[str] = ()
) -> None:
    """:func:`fit_recipe` of an SAE on an activation store."""
    fit_recipe(name, run, steps, seed, progress, ["--data.store", str(store), *extra])

"""The tiny LLaVA of the generated world that benchmarks read, trained once in a benchmark's folder."""

from __future__ import annotations

from typing import Any

from mmsae.jobs.stages import Stages
from mmsae.options import call

#: Settings of the model, written down so that it stays half-trained when the defaults get better.
BASE = {"batch_size": 32, "lr": 0.02, "adam_lr": 2e-3, "hidden": 128, "layers": 3}
WORLD_SEED, MODEL_SEED = 1, 0


def base_model(
    stages: Stages, scenes: int, clip_steps: int, steps: int, clip: str | None = None, progress: bool = True
) -> tuple[str, str]:
    """Folders of a CLIP and of a LLaVA on its image trunk, both trained on ``scenes`` clean scenes.

    Args:
        stages: The benchmark's; the models come to its folder as ``clip`` and ``base``.
        scenes: Scenes of the generated world, of seed :data:`WORLD_SEED`.
        clip_steps: Steps of the CLIP.
        steps: Steps of the LLaVA.
        clip: Folder of a CLIP of the generated world, in place of one that is trained here.
        progress: Whether to print what is done and show bars.
    """
    from mmsae.world.generator.shards import write_world
    from mmsae.world.models.command import pretrain_clip
    from mmsae.world.models.llava.model import train_llava

    root, how = stages.folder.out, {"overwrite": True, "progress": progress}
    if clip is None:
        clip = str(root / "clip")

        def train_clip() -> dict[str, Any]:
            write_world(root / "shards" / "clean", scenes, WORLD_SEED, progress=False)
            shards = str(root / "shards" / "clean")
            return call(pretrain_clip, shards=shards, out=clip, steps=clip_steps, seed=MODEL_SEED, **how)

        stages.run("stages/clip", train_clip)
    base = str(root / "base")
    stages.run(
        "stages/base",
        lambda: call(train_llava, data=scenes, clip=clip, out=base, steps=steps, seed=MODEL_SEED,
                     data_seed=WORLD_SEED, **how, **BASE),
    )  # fmt: skip
    return clip, base

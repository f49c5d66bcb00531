"""The part of ``mmsae demo`` about drawing: a tiny Stable Diffusion, an SAE on its text states, one colour for another.

It needs nothing but the shards and runs as a process of its own, from the moment these are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmsae.demo.curves import last_validation
from mmsae.demo.stages import PROFILES, SEEDS, Profile, fit_recipe, stage_log
from mmsae.files import atomic_file, write_json
from mmsae.jobs.processes import main
from mmsae.options import call

MODULE, LOG, STATE, RESULTS = "mmsae.demo.diffusion", "diffusion.log", "diffusion.json", "steering_results.json"
IMAGES, PROBE = "steering_pictures.safetensors", "probe/probe.safetensors"
SOURCE, TARGET = "red", "blue"  # fixed before any was tried; docs/results/world.md has more pairs
SHOWN = 6  # prompts whose images are kept
CHOOSE, TUNE = 80, 18  # prompts that choose latents, and k and strength; 150 of one colour in all
DRAW = {"steps": 20, "guidance": 3.0}


def write_prompts(file: Path, n: int, seed: int) -> None:
    """Full and partial captions of the world's scenes of one object, one a line."""
    from mmsae.world.generator.captions import full_captions, partial_captions
    from mmsae.world.generator.scene import sample_scenes

    scenes = sample_scenes(n, seed)
    alone = scenes.rows(~scenes.two)
    with atomic_file(file) as temp:
        temp.write_text("\n".join([*full_captions(alone), *partial_captions(alone, seed)]) + "\n")


def measure(root: Path, p: Profile, seed: int) -> dict[str, Any]:
    """Figures of the pipeline, its SAE, and one substitution beside its controls; images go to a file."""
    import torch
    from safetensors.torch import save_file

    from mmsae.hosts import load_host
    from mmsae.sae import SAE
    from mmsae.steering import Edit, FeatureStats, Intervention
    from mmsae.steering.measure.controls import Control
    from mmsae.world.generator.scene import COLOURS
    from mmsae.world.measure.probe import WorldProbe
    from mmsae.world.models.diffusion.evaluate import (
        SITE,
        colour_contrast,
        draw_prompts,
        draw_with,
        evaluate_diffusion,
        outcome,
        substitution,
        tune,
    )

    host = load_host(f"diffusers:{root / 'diffusion'}")
    sae, probe = (SAE.from_pretrained(root / "diffusion_text" / "sae"), WorldProbe.load(root / PROBE))
    asked = draw_prompts(p.drawn, seed)
    drawn = evaluate_diffusion(
        lambda texts: host.generate(texts, seed=range(len(texts)), batch_size=48, **DRAW), asked, probe
    )
    live = draw_prompts(300, seed, vary=True).texts
    stats = FeatureStats.collect(sae, host.stream(live, SITE, batch_size=100), tokens="all")

    prompts, target = draw_prompts(150, seed, SOURCE, vary=True), COLOURS.index(TARGET)
    choosing, tuning = prompts.rows(slice(0, CHOOSE)), prompts.rows(slice(CHOOSE, CHOOSE + min(TUNE, p.steered)))
    reported = prompts.rows(slice(CHOOSE + TUNE, CHOOSE + TUNE + p.steered))
    contrast = colour_contrast(host, sae, choosing, TARGET)
    k, strength, tried = tune(host, sae, contrast, tuning, target, probe, stats=stats, **DRAW)
    edit = substitution(contrast, k, strength, stats)
    ways: dict[str, Any] = {
        "unsteered": (None, reported.texts),
        "target prompt": (None, reported.recoloured(TARGET).texts),
        "SAE reconstruction": (Intervention(Edit(), writeback="splice", tokens="all"), reported.texts),
        "substitution": (edit, reported.texts),
    } | {f"random {j}": (Control(edit, seed=j), reported.texts) for j in range(p.controls)}
    table, kept = [], {}
    for name, (way, texts) in ways.items():
        images, relative = draw_with(host, sae, way, texts, **DRAW)
        table.append({"way": name, **outcome(images, reported, target, probe)._asdict(), "relative": relative})
        kept[name] = images[:SHOWN].contiguous()
    with atomic_file(root / IMAGES) as temp:
        save_file({n: torch.as_tensor(x) for n, x in kept.items()}, temp)
    training = json.loads((root / "diffusion" / "training.json").read_text())
    return {
        "pipeline": drawn,
        "text_sae": last_validation(root / "diffusion_text"),
        "edit": {"source": SOURCE, "target": TARGET, "k": k, "strength": strength, "latents": list(edit.edit.ids)},
        "tried": tried,
        "table": table,
        "prompts": {"chosen_on": len(choosing.texts), "tuned_on": len(tuning.texts), "reported": reported.texts},
        "diffusion": training | {"curve": None},
    }


def run(root: Path, profile: str, seed: int) -> None:
    """All stages; those that are done are skipped."""
    from mmsae.world.measure.probe import train_probe
    from mmsae.world.models.command import pretrain_diffusion

    p = PROFILES[profile]
    stages = stage_log(root / STATE, {"profile": profile, "seed": seed, **p._asdict(), "format": 1})
    out, fitted = root / "diffusion", root / "diffusion_text"
    stages.run(
        "diffusion",
        lambda: call(pretrain_diffusion, shards=str(root / "shards" / "train"), out=str(out), steps=p.diffusion_steps,
                     seed=seed, overwrite=True, progress=False),
    )  # fmt: skip
    stages.run("probe", lambda: train_probe(48 * p.probe_steps, p.probe_steps).save(root / PROBE))
    stages.run("prompts", lambda: write_prompts(root / "prompts.txt", p.train, SEEDS["train"]))
    extra = [f"--data.prompts={root / 'prompts.txt'}", f"--data.host=diffusers:{out}"]
    extra += ["--trainer.val_check_interval", str(p.token_steps)]
    stages.run("fit_text", lambda: fit_recipe("diffusion_text", fitted, p.token_steps, seed, False, extra))
    stages.run("steering", lambda: write_json(root / RESULTS, measure(root, p, seed)))


if __name__ == "__main__":
    main(run)

"""The tiny text-to-image pipeline and the SAE on its text states, on prompts that chose nothing.

    python benchmarks/world_diffusion.py --out runs/world_diffusion

For each seed: trains pipeline and SAE as ``mmsae demo`` does, draws 90 prompts, and puts one colour in place of another
for three pairs of colours: latents are chosen on 80 prompts, their number and the strength on 18, shares are of 36
others, beside 20 random directions of equal size. Finished stages are kept. Prints markdown.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from mmsae import load_pair
from mmsae.demo.diffusion import CHOOSE, DRAW, PROBE, TUNE, write_prompts
from mmsae.demo.stages import PROFILES, SEEDS, fit_recipe, stage_log
from mmsae.options import call
from mmsae.report.tables import markdown_table
from mmsae.steering import FeatureStats
from mmsae.steering.measure.controls import Control
from mmsae.world.generator.scene import COLOURS
from mmsae.world.generator.shards import write_world
from mmsae.world.measure.probe import WorldProbe, train_probe
from mmsae.world.models.command import pretrain_diffusion
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

PAIRS = (("red", "blue"), ("green", "purple"), ("yellow", "cyan"))
PROMPTS, REPORTED = 7, 36  # the seed of the prompts; others were looked at when the method was written


def train(root: Path, out: Path, seed: int) -> None:
    p = PROFILES["default"]
    stages = stage_log(out / "stages.json", {"seed": seed, "steps": p.diffusion_steps})
    shards = str(root / "shards")
    stages.run(
        "diffusion",
        lambda: call(
            pretrain_diffusion,
            shards=shards,
            out=str(out / "diffusion"),
            steps=p.diffusion_steps,
            seed=seed,
            overwrite=True,
        ),
    )
    extra = [f"--data.prompts={root / 'prompts.txt'}", f"--data.host=diffusers:{out / 'diffusion'}"]
    extra += ["--trainer.val_check_interval", str(p.token_steps)]
    stages.run("sae", lambda: fit_recipe("diffusion_text", out / "text", p.token_steps, seed, True, extra))


def substitute(host, sae, stats, probe, source: str, target: str, controls: int) -> list[list]:
    prompts, wanted = draw_prompts(150, PROMPTS, source, vary=True), COLOURS.index(target)
    contrast = colour_contrast(host, sae, prompts.rows(slice(0, CHOOSE)), target)
    tuning = prompts.rows(slice(CHOOSE, CHOOSE + TUNE))
    reported = prompts.rows(slice(CHOOSE + TUNE, CHOOSE + TUNE + REPORTED))
    k, strength, _ = tune(host, sae, contrast, tuning, wanted, probe, stats=stats, **DRAW)
    edit = substitution(contrast, k, strength, stats)

    def shown(way, texts):
        pictures, size = draw_with(host, sae, way, texts, **DRAW)
        return *outcome(pictures, reported, wanted, probe), size

    random = [shown(Control(edit, seed=j), reported.texts) for j in range(controls)]
    pair = f"{source} to {target}"
    return [
        [pair, "unsteered", *shown(None, reported.texts)],
        [pair, "target prompt", *shown(None, reported.recoloured(target).texts)],
        [pair, f"k {k}, strength {strength:g}", *shown(edit, reported.texts)],
        [pair, f"{controls} random directions, mean", *map(statistics.fmean, zip(*random, strict=True))],
        [pair, "of these, most of the target", *max(random, key=lambda r: r[1])],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/world_diffusion"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--controls", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, p = args.out, PROFILES["default"]
    data = stage_log(root / "stages.json", {"n": p.train})
    data.run("shards", lambda: write_world(root / "shards", p.train, SEEDS["train"]))
    data.run("prompts", lambda: write_prompts(root / "prompts.txt", p.train, SEEDS["train"]))
    data.run("probe", lambda: train_probe(progress=True).save(root / PROBE))
    probe, rows, drawn = WorldProbe.load(root / PROBE), [], []
    for seed in args.seeds:
        out = root / f"seed-{seed}"
        train(root, out, seed)
        sae, host = load_pair(out / "text" / "sae", f"diffusers:{out / 'diffusion'}", device="cpu")
        asked = draw_prompts(90, PROMPTS)
        found = evaluate_diffusion(
            lambda texts, host=host: host.generate(texts, seed=range(len(texts)), batch_size=48, **DRAW), asked, probe
        )
        stats = json.loads((out / "diffusion" / "training.json").read_text())
        drawn.append([seed, stats["seconds"]["cpu"], found["colour"], found["background"], *found["probe"].values()])
        live = draw_prompts(300, PROMPTS, vary=True).texts
        usage = FeatureStats.collect(sae, host.stream(live, SITE, batch_size=100), tokens="all")
        for source, target in PAIRS:
            rows += [[seed, *row] for row in substitute(host, sae, usage, probe, source, target, args.controls)]
    table(["seed", "CPU-s", "colour", "background", *(f"{a} (classifier)" for a in found["probe"])], drawn)
    table(
        ["seed", "pair", "way", "source seen", "target seen", "background right", "size right", "relative change"], rows
    )
    (root / "results.json").write_text(json.dumps({"drawn": drawn, "edits": rows}, indent=1))


def table(head: list[str], rows: list[list]) -> None:
    print("\n" + markdown_table(head, rows, digits=2))


if __name__ == "__main__":
    main()

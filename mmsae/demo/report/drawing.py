"""Section of the demo's page about the text-to-image pipeline: what it draws, and one colour made another."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from mmsae.report import Fact, Figure, Section, Table

SHOWN = ("unsteered", "substitution", "random 0", "random 1", "target prompt")


def steering_section(out: Path, results: dict[str, Any]) -> Section:
    """Before and after, beside random directions of equal size, with the shares over all prompts."""
    r = results["steering"]
    source, target = r["edit"]["source"], r["edit"]["target"]
    rows = {row["way"]: row for row in r["table"]}
    drawn, edited = r["pipeline"], rows["substitution"]
    random = [row for way, row in rows.items() if way.startswith("random")]
    mean = {
        k: statistics.fmean(row[k] for row in random) for k in ("source", "target", "background", "size", "relative")
    }
    facts = [
        Fact("colour as prompted", drawn["colour"], f"{drawn['n']} prompts, by pixels"),
        Fact("background as prompted", drawn["background"]),
        Fact(f"{source} became {target}", edited["target"], f"{len(r['prompts']['reported'])} prompts"),
        Fact("the same, random directions", mean["target"], f"mean of {len(random)} draws, equal size"),
        Fact("background kept", edited["background"]),
    ]
    table = Table(
        ["way", f"{source} is seen", f"{target} is seen", "background is right", "size is right", "|dx| / |x|"],
        [[w, *(row[k] for k in mean)] for w, row in rows.items() if not w.startswith("random")]
        + [[f"random directions, mean of {len(random)}", *mean.values()]]
        + [[f"the most {target} of them", *(max(random, key=lambda row: row["target"])[k] for k in mean)]],
        f"Prompts of a {source} object: what the pixels of the drawn images show",
    )
    shape = drawn["probe"]["shape"]
    intro = f"""
The same shards teach a tiny Stable Diffusion (text encoder, denoiser and a linear autoencoder of patches; a plain
`diffusers` folder). A TopK SAE on its text encoder's last states leaves {r["text_sae"]["fvu/text"]:.1%} of the variance
unexplained. {len(r["edit"]["latents"])} latents that tell {source} from {target} prompts were exchanged on the tokens
where those of {source} fire. They were chosen on {r["prompts"]["chosen_on"]} prompts, their number and strength on
{r["prompts"]["tuned_on"]} more, and everything below is from others. A random direction moves the same tokens just as
far. What was drawn is said by arithmetic on pixels and by a classifier that learned from renders, not by the model
itself. Shape is as prompted in {shape:.0%} of the images (chance 20%): a pipeline of this size and training draws
colour, background and size as told, but not shape and place.
"""
    return Section("Drawing, and steering what is drawn", intro, [_images(out, r)], [table], facts=facts)


def _images(out: Path, r: dict[str, Any]) -> Figure:
    from safetensors.torch import load_file

    from mmsae.demo.diffusion import IMAGES
    from mmsae.report.figures import canvas, figure

    kept = load_file(out / IMAGES)
    ways = [w for w in SHOWN if w in kept]
    n = len(kept[ways[0]])
    with canvas(n, len(ways), width=1.6 + 1.1 * n, height=1.15 * len(ways), squeeze=False) as (fig, axes):
        for line, way in zip(axes, ways, strict=True):
            for axis, image in zip(line, kept[way], strict=True):
                axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
            line[0].set_ylabel(way, rotation=0, ha="right", va="center")
        caption = "Each column is one prompt and one noise: " + "; ".join(r["prompts"]["reported"][:n])
        return figure(fig, "images before and after steering", caption)

"""What a vision-language model says when it is pushed along latents, in the generated world, where names are words.

    python -m benchmarks.pushed --demo runs/demo --out runs/pushed --seeds 0 1 2

For each seed an SAE of 512 latents on what the demo's LLaVA reads of images (``layers.0:in``; ``layers.1:out``, where
the demo's own SAE is, moves what is said by no more than a KL of .02, however hard it is pushed), and one of random
weights; evidence on the test images, and names by captions. Then ``mmsae score --scorers intervention`` of some
latents, and what the model says of a blank image and of the top images with a latent put in (``mmsae name --methods
steering``): how often that has the words of the latent's own name, and of another's.

The judge of the scores is no model but counts words: ``P(word | text) = (times in the text + a) / (words + a V)``. So
what the host is made to say is told from what it said before by nothing but its words.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.files import write_json
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.report.tables import markdown_table

A, V = 0.1, 50
JUDGE = "benchmarks.pushed:CLIENT"
SITES = '{image: "layers.0:in[image]", text: "layers.0:in[text]"}'
ASKED = "describe the image."  # the one of its questions that is answered at length
EMPTY = frozenset("a an the on in at of background and".split())  # words of names that say nothing
#: ``{(scorer, control): how the table calls it}``.
ROWS = {
    ("intervention", ""): "names",
    ("intervention", "shuffled"): "names of others",
    ("intervention_random", ""): "names, random directions at equal KL",
    ("intervention_zero", ""): "names, ablation",
    ("intervention", "random"): "random weights: their names",
    ("intervention_found", ""): "explanations found by the push",
    ("intervention_found", "shuffled"): "those of others",
    ("intervention_found_random", ""): "explanations found for random directions",
    ("intervention_found", "random"): "explanations found for latents of random weights",
}


def likely(prefix: str, text: str) -> np.ndarray:
    """``(words,)`` log-probabilities of the words of ``text`` after a question of the scorer ``intervention``."""
    said = re.sub(r"^Text: |\n\nThis text is about $", "", prefix).lower().split()
    return np.array([np.log((said.count(w) + A) / (len(said) + A * V)) for w in text.lower().split()])


CLIENT = ScriptedClient(score=likely, name="pushed")


def has(name: str, answers: Sequence[str]) -> bool:
    """Whether one of some answers has all words of a name."""
    return any(set(name.split()) - EMPTY <= set(a.split()) for a in answers)


def run(demo: Path, out: Path, seed: int, latents: int) -> dict[str, Any]:
    """Figures of one seed."""
    from mmsae import SAE
    from mmsae.demo.stages import fit_recipe
    from mmsae.interpret.evidence.command import evidence
    from mmsae.interpret.names.command import name
    from mmsae.interpret.scores.command import score
    from mmsae.options import call
    from mmsae.sae import random_control

    host, sae, fresh = f"lvlm:{demo / 'llava'}", out / "fit" / "sae", out / "random"
    if not sae.exists():
        data = ["--data.shards", str(demo / "talk" / "train"), "--data.val_shards", str(demo / "talk" / "test")]
        fit_recipe("llava_tokens", out / "fit", 300, seed, False, [*data, "--data.host", host, "--data.sites", SITES])
    made = SAE.from_pretrained(sae)
    control = random_control(made, seed)
    control.sites = made.sites
    control.save_pretrained(fresh)
    folders = [str(out / "evidence"), str(out / "evidence_random")]
    call(evidence, sae=[str(sae), str(fresh)], shards=str(demo / "shards" / "test"), out=folders, host=host, seed=seed,
         workers=0, progress=False)  # fmt: skip
    named = {"modality": "image", "control": folders[1], "false_names": 0.15, "progress": False}
    call(name, evidence=folders[0], **named)
    pair = {"sae": str(sae), "control_sae": str(fresh)}
    call(score, evidence=folders[0], control=folders[1], **pair, seed=seed,
         scorers=("intervention",), client=f"script:{JUDGE}", asked=latents, progress=False)  # fmt: skip
    found = json.loads((out / "evidence" / "scores" / "scores.json").read_text())
    rows = {
        label: {k: r[k] for k in ("mean", "low", "high", "latents")}
        for r in found["summary"] if r["which"] == "all" and (label := ROWS.get((r["scorer"], r["control"])))
    }  # fmt: skip
    kl = [p[k] for p in found["pushes"] for k in ("kl", "random_kl")]
    said = steered(out, sae, host, seed)
    return {"seed": seed, "rows": rows, "kl": [min(kl), max(kl)], "notes": found["notes"], "steered": said}


def steered(out: Path, sae: Path, host: str, seed: int) -> dict[str, Any]:
    """How often answers with a named latent put in have the words of its name, and of another's."""
    from mmsae import SAE
    from mmsae.interpret.clients.asked import Asked
    from mmsae.interpret.clients.local import LocalClient
    from mmsae.interpret.evidence.folder import Evidence
    from mmsae.interpret.names.job import Naming
    from mmsae.interpret.names.options import Looking
    from mmsae.interpret.names.spoken import spoken_candidates
    from mmsae.interpret.scores.subjects import misplaced
    from mmsae.metrics.concepts.names import FILE, names_only, read_names

    names = names_only(read_names(out / "evidence" / "names" / FILE))
    latents = sorted(names)
    looking = Looking(methods=("steering",), latents=tuple(latents), modality="image", question=ASKED)
    naming = Naming(Evidence(out / "evidence"), looking, sae=SAE.from_pretrained(sae), cache=False)
    asked = Asked(LocalClient(host), out / "evidence" / "names" / "answers")
    said: dict[int, list[str]] = {j: [] for j in latents}
    for part in spoken_candidates(naming, asked, 0):
        for j, phrase in zip(part.latent.tolist(), part.phrase.tolist(), strict=True):
            said[j].append(phrase)
    own = [names[j] for j in latents]
    shares = [
        float(np.mean([has(n, said[j]) for j, n in zip(latents, some, strict=True)]))
        for some in (own, misplaced(own, seed))
    ]
    return {"latents": len(latents), "own": shares[0], "others": shares[1]}


def table(found: Sequence[dict[str, Any]]) -> str:
    """The table of all seeds."""

    def cell(r: dict[str, float]) -> str:
        return f"{r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"

    rows = [[label, *(cell(f["rows"][label]) for f in found)] for label in ROWS.values()]
    said = [["named latents", *(f["steered"]["latents"] for f in found)]]
    for key, label in (("own", "answers with a latent put in have its name"), ("others", "another's")):
        said.append([label, *(f"{f['steered'][key]:.2f}" for f in found)])
    head = [f"seed {f['seed']}" for f in found]
    return markdown_table(["gain in nats", *head], rows) + "\n\n" + markdown_table(["share", *head], said) + "\n"


def main(args: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--latents", type=int, default=40)
    given = parser.parse_args(args)
    found = [run(given.demo, given.out / f"seed_{s}", s, given.latents) for s in given.seeds]
    write_json(given.out / "pushed.json", found)
    (given.out / "table.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()

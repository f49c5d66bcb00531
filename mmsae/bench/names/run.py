"""``mmsae bench names``: names, abstention and intruders on SAEs of a tiny CLIP of the generated world."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmsae.bench.names.measure import by_concepts, by_embeddings, figures, intruders, meaning
from mmsae.bench.stages import stages_of
from mmsae.bench.summary import over_seeds
from mmsae.files import write_json
from mmsae.report.tables import markdown_table

WORLD = 100  # seeds of the worlds here lie apart from those of the demo, on which defaults were chosen
METHODS = ("all", "captions", "wpmi", "centroid", "vocabulary")
#: ``{figure: (what is asked, its bound, whether at least)}``.
BARS = {
    "named_right": ("right names of latents with F1 of .8 or more", 0.9),
    "abstained_random": ("abstention on latents of random weights", 0.8),
    "intruder_truth_strong_clear": ("intruders among strong items, by true concepts, F1 of .8 or more", 0.8),
    "intruder_truth_clear": ("the same among items of all strengths", 0.8),
    "intruder_host_clear": ("the same by the host's embeddings", 0.8),
}
COLUMNS = {
    "guess_right": "best guess right", "named_right": "named right", "named_wrong": "named wrong",
    "named": "named of all with evidence", "abstained_random": "abstained on random weights",
}  # fmt: skip


class NameSizes(NamedTuple):
    """Sizes of the benchmark."""

    train: int = 20_000  #: Images that CLIP and SAEs are trained on
    items: int = 8_000  #: Images that evidence is collected on
    clip_steps: int = 400  #: Steps of the CLIP
    sae_steps: int = 800  #: Steps of each SAE


def bench_names(
    root: Path, seeds: Sequence[int] = (0, 1, 2), size: NameSizes = NameSizes(), clip: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The benchmark at any size; a folder may be gone on with by more seeds.

    Args:
        root: Folder for everything.
        seeds: Of worlds, SAEs and random weights.
        size: Sizes.
        clip: Folder of a CLIP of the world; None: one is trained.
        progress: Whether to say what is done.
    """
    stages = stages_of(root, {"bench": "names", **size._asdict(), "clip": clip}, progress=False)
    if progress:
        print(f"mmsae bench names: a CLIP and {len(seeds)} SAEs of the world, with random controls; about "
              f"{1 + 2.5 * len(seeds):.0f} minutes of one core; {root}", flush=True)  # fmt: skip
    start, runs = time.perf_counter(), []
    host = clip or str(root / "clip")
    if clip is None:
        stages.run("clip_done", lambda: _clip(root, size, progress))
    for seed in seeds:
        runs.append(stages.run(f"runs/{seed}", lambda seed=seed: _run(root / f"seed_{seed}", seed, host, size, root)))
        if progress:
            r = runs[-1]["methods"]["all"]
            said = f"{r['named_right']:.0%} of {r['clear']:.0f} clear latents named right"
            said += f", {r['abstained_random']:.0%} of {r['random']:.0f} random ones not named"
            print(f"[{time.perf_counter() - start:.0f} s] seed {seed}: {said}", flush=True)
    found = {"seeds": list(seeds), "sizes": size._asdict(), "runs": runs, **_summary(runs)}
    write_json(root / "results.json", found)
    (root / "table.md").write_text(names_table(found), encoding="utf-8")
    return {**found, "out": str(root / "table.md")}


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    methods = {m: over_seeds([r["methods"][m] for r in runs]) for m in METHODS}
    intruder = over_seeds([r["intruder"] for r in runs])
    whole = methods["all"] | {f"intruder_{k}": v for k, v in intruder.items()}
    bars = {k: {"what": what, "bar": bar, "value": whole[k], "met": whole[k] >= bar} for k, (what, bar) in BARS.items()}
    return {"methods": methods, "intruder": intruder, "bars": bars}


def names_table(found: dict[str, Any]) -> str:
    """Bars, methods and intruders, in markdown."""
    n, whole = len(found["seeds"]), found["methods"]["all"]
    parts = [
        f"Means over {n} SAE{'s' if n > 1 else ''} of one CLIP; of each SAE {whole['live']:.0f} latents have evidence, "
        f"{whole['clear']:.0f} of which have an F1 of .8 or more with a concept; {whole['random']:.0f} random ones."
    ]
    rows = [
        [b["what"], f"{b['value']:.3f}", f"{b['bar']:g}", "yes" if b["met"] else "no"] for b in found["bars"].values()
    ]
    parts.append(markdown_table(["asked", "here", "bar", "met"], rows))
    rows = [[m, *(_cell(found["methods"][m], c) for c in COLUMNS)] for m in METHODS]
    parts.append(markdown_table(["methods", *COLUMNS.values()], rows))
    i = found["intruder"]
    rows = [[judge, *(_cell(i, f"{key}_{which}") for which in ("clear", "named", "live", "random"))]
            for judge, key in (("true concepts, strong items", "truth_strong"), ("true concepts", "truth"),
                               ("the host's embeddings, strong items", "host_strong"),
                               ("the host's embeddings", "host"))]  # fmt: skip
    head = ["intruder of 5 by (chance .2)", "F1 of .8 or more", "named", "all with evidence", "random weights"]
    parts.append(markdown_table(head, rows))
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.3f}" + (f" ± {row[f'{name}_sd']:.3f}" if f"{name}_sd" in row else "")


def _clip(root: Path, size: NameSizes, progress: bool) -> dict[str, Any]:
    from mmsae.options import call
    from mmsae.world.generator.shards import write_world
    from mmsae.world.models.command import pretrain_clip

    write_world(root / "clip_shards", size.train, WORLD, "train", progress=progress)
    call(pretrain_clip, shards=str(root / "clip_shards"), out=str(root / "clip"), steps=size.clip_steps, seed=0,
         progress=progress)  # fmt: skip
    return {"shards": str(root / "clip_shards")}


def _run(folder: Path, seed: int, clip: str, size: NameSizes, root: Path) -> dict[str, Any]:
    """One SAE and its random control: evidence on images that neither has seen, and figures of its names."""
    from mmsae.activations import extract
    from mmsae.demo.stages import fit_method
    from mmsae.interpret.evidence.folder import Evidence
    from mmsae.sae import SAE
    from mmsae.sae.random_control import random_control
    from mmsae.world.generator.scene import CONCEPTS
    from mmsae.world.generator.shards import write_world

    host, evidence = f"local-dir:{clip}", {}
    if not (folder / "store").exists():
        write_world(folder / "train", size.train, WORLD + 1 + 2 * seed, "train", progress=False)
        extract(host, str(folder / "train"), folder / "store", progress=False)
    if not (folder / "fit" / "sae").exists():
        fit_method("paired_topk", folder / "store", folder / "fit", size.sae_steps, seed, False)
    data = write_world(folder / "items", size.items, WORLD + 2 + 2 * seed, "items", progress=False)
    sae = SAE.from_pretrained(folder / "fit" / "sae")
    fresh = random_control(sae, seed)
    fresh.sites = sae.sites
    fresh.save_pretrained(folder / "random")
    for name, path in (("sae", folder / "fit" / "sae"), ("random", folder / "random")):
        evidence[name] = Evidence(_collect(path, folder / "items", folder / f"evidence_{name}", host, seed))
    (root / "words.txt").write_text("\n".join(CONCEPTS) + "\n", encoding="utf-8")
    (root / "templates.txt").write_text("{}\n", encoding="utf-8")
    return _measured(evidence, {"sae": sae, "random": fresh}, data, root)


def _collect(sae: Path, shards: Path, out: Path, host: str, seed: int) -> Path:
    from mmsae.interpret.evidence.command import evidence
    from mmsae.options import call

    call(evidence, sae=str(sae), shards=str(shards), out=str(out), host=host, seed=seed, progress=False, workers=0)
    return out


def _measured(evidence: dict[str, Any], saes: dict[str, Any], data: Any, root: Path) -> dict[str, Any]:
    from mmsae.interpret.names.job import Naming, write_named
    from mmsae.interpret.names.options import Looking
    from mmsae.types import IMAGE

    at = {u: i for i, u in enumerate(data.uids)}
    truth = {k: data.concepts[[at[u] for u in ev.items.uid]] for k, ev in evidence.items()}
    real = meaning(evidence["sae"], truth["sae"])
    methods, named = {}, {}
    for method in METHODS:
        looking = Looking(() if method == "all" else (method,), str(root / "words.txt"), str(root / "templates.txt"),
                          modality="image")  # fmt: skip
        naming = {k: Naming(ev, looking, sae=saes[k]) for k, ev in evidence.items()}
        found = {k: n.run() for k, n in naming.items()}
        live = [naming[k].latents[IMAGE].tolist() for k in ("sae", "random")]
        methods[method] = figures(real, found["sae"].names, found["sae"].candidates, found["random"].names, live)
        if method == "all":
            named = found["sae"].names
            groups = live
            for k, ev in evidence.items():
                write_named(ev.folder / "names", found[k], ev.about["job"]["sae"])
    own, random = groups
    sets = {
        "clear": [j for j in own if real.f1[:, j].max() >= 0.8],
        "named": [j for j in own if named[j].name],
        "live": own,
    }
    intruder = {}
    for judge in ("truth", "host"):
        for k, latents in (*((name, ("sae", ids)) for name, ids in sets.items()), ("random", ("random", random))):
            ev = evidence[latents[0]]
            choose = by_concepts(truth[latents[0]]) if judge == "truth" else by_embeddings(ev.embeddings(IMAGE))
            for strong in (False, True):
                key = f"{judge}_strong_{k}" if strong else f"{judge}_{k}"
                intruder[key] = intruders(ev, latents[1], choose, strong)["accuracy"]
    return {"methods": methods, "intruder": intruder}

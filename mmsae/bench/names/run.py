"""``mmsae bench names``: names, abstention and intruders on SAEs of a tiny CLIP of the generated world."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.bench.names.measure import CLEAR, SIZE, TENTHS, by_concepts, by_embeddings, figures, intruders, meaning
from mmsae.bench.stages import stages_of
from mmsae.bench.summary import over_seeds
from mmsae.files import write_json
from mmsae.report.tables import markdown_table

FORMAT = 3  # of what is kept of a seed
APART = 1000  # between the seeds of the two SAEs of random weights
WORLD = 100  # seeds of the worlds here lie apart from those of the demo, on which defaults were chosen
EACH = 4  # sets with an intruder of each tenth of a latent's values
METHODS = ("all", "captions", "wpmi", "centroid", "vocabulary")
CALIBRATED = "all, by a control"  # by --control instead of --min-auroc
#: ``{figure: (what is asked, its bound, whether at least)}``.
BARS = {
    "named_right": ("right names of latents with F1 of .8 or more", 0.9),
    "abstained_random": ("abstention on latents of random weights", 0.8),
    "truth_clear_strong": ("intruders among strong items, by true concepts, F1 of .8 or more", 0.8),
    "truth_clear_mean": ("the same among items of all strengths", 0.8),
    "host_clear_mean": ("the same by the host's embeddings", 0.8),
}
#: ``{judge: what it is}`` and ``{group: what they are}`` of the intruders.
JUDGES = {"truth": "true concepts", "host": "the host's embeddings"}
GROUPS = {
    "clear": "F1 of .8 or more", "clear_dealt": "the same, items dealt at random", "named": "named",
    "live": "all with evidence", "random": "random weights", "random_dealt": "the same, items dealt at random",
}  # fmt: skip
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
    #: Whether SAEs are read by a threshold, and not by the k that they are trained with (:func:`mmsae.sae.to_jumprelu`)
    threshold: bool = True


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
    stages = stages_of(root, {"bench": "names", "format": FORMAT, **size._asdict(), "clip": clip}, progress=False)
    if progress:
        print(f"mmsae bench names: a CLIP and {len(seeds)} SAEs of the world, with random controls; about "
              f"{1 + 3 * len(seeds):.0f} minutes of one core; {root}", flush=True)  # fmt: skip
    start, runs = time.perf_counter(), []
    host = clip or str(root / "clip")
    if clip is None:
        stages.run("clip_done", lambda: _clip(root, size, progress))
    for seed in seeds:
        runs.append(stages.run(f"runs/{seed}", lambda seed=seed: _run(root / f"seed_{seed}", seed, host, size, root)))
        if progress:
            r = runs[-1]["methods"][CALIBRATED]
            said = f"{r['named_right']:.0%} of {r['clear']:.0f} clear latents named right"
            said += f", {r['abstained_random']:.0%} of {r['random']:.0f} random ones not named"
            print(f"[{time.perf_counter() - start:.0f} s] seed {seed}: {said}", flush=True)
    found = {"seeds": list(seeds), "sizes": size._asdict(), "runs": runs, **_summary(runs)}
    write_json(root / "results.json", found)
    (root / "table.md").write_text(names_table(found), encoding="utf-8")
    return {**found, "out": str(root / "table.md")}


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    methods = {m: over_seeds([r["methods"][m] for r in runs]) for m in (CALIBRATED, *METHODS)}
    intruder = {k: _pooled([r["intruder"][k] for r in runs]) for k in runs[0]["intruder"]}
    whole = methods[CALIBRATED] | {
        f"{k}_{kind}": v[kind][0] for k, v in intruder.items() for kind in ("mean", "strong")
    }
    bars = {k: {"what": what, "bar": bar, "value": whole[k], "met": whole[k] >= bar} for k, (what, bar) in BARS.items()}
    value, low, high = intruder["truth_clear_dealt"]["mean"]
    bars["dealt"] = {"what": "items dealt at random, at chance", "bar": 1 / SIZE, "value": value,
                     "met": low <= 1 / SIZE <= high}  # fmt: skip
    return {"methods": methods, "intruder": intruder, "bars": bars}


def _pooled(tables: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Latents of all seeds, of tables ``(L, 10)``: the mean of ``strong`` sets (the stronger half of the tenths) and of
    all with 95 % intervals over latents, and the ``curve`` over tenths.
    """
    import torch

    from mmsae.metrics.statistics import bootstrap_mean

    each = np.array([row for table in tables for row in table], np.float64).reshape(-1, TENTHS)

    def mean(part: np.ndarray) -> list[float]:
        own = np.array([row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else np.nan for row in part])
        return [float(np.nanmean(own)) if len(own) else float("nan"), *bootstrap_mean(torch.from_numpy(own))]

    curve = [float(np.nanmean(c)) if (~np.isnan(c)).any() else float("nan") for c in each.T]
    return {"mean": mean(each), "strong": mean(each[:, : TENTHS // 2]), "curve": curve, "latents": len(each),
            "sets": int(EACH * (~np.isnan(each)).sum())}  # fmt: skip


def names_table(found: dict[str, Any]) -> str:
    """Bars, methods and intruders, in markdown."""
    n, whole = len(found["seeds"]), found["methods"][CALIBRATED]
    parts = [
        f"Means over {n} SAE{'s' if n > 1 else ''} of one CLIP; of each SAE {whole['live']:.0f} latents have evidence, "
        f"{whole['clear']:.0f} of which have an F1 of .8 or more with a concept; {whole['random']:.0f} random ones."
    ]
    rows = [
        [b["what"], f"{b['value']:.3f}", f"{b['bar']:g}", "yes" if b["met"] else "no"] for b in found["bars"].values()
    ]
    parts.append(markdown_table(["asked", "here", "bar", "met"], rows))
    rows = [[m, *(_cell(found["methods"][m], c) for c in COLUMNS)] for m in (CALIBRATED, *METHODS)]
    parts.append(markdown_table(["methods", *COLUMNS.values()], rows))
    rows, curves = [], []
    for judge, by in JUDGES.items():
        for group, what in GROUPS.items():
            i = found["intruder"][f"{judge}_{group}"]
            strong, every = ("{:.3f} [{:.3f}, {:.3f}]".format(*i[k]) for k in ("strong", "mean"))
            rows.append([by, what, strong, every, str(i["latents"]), f"{i['sets']:,}"])
            if judge == "truth":
                curves.append([what, *(f"{v:.2f}" for v in i["curve"])])
    head = ["intruder of 5 by (chance .2)", "latents that", "strong items", "items of all strengths", "latents", "sets"]
    parts.append(markdown_table(head, rows))
    tenths = [f"{i}0 %" for i in range(1, TENTHS + 1)]
    parts.append(markdown_table(["by true concepts, strongest", *tenths], curves))
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
    """One SAE, one of random weights that is named, and another by which names are held: evidence on images that none
    has seen, and figures of the names.
    """
    from mmsae.activations import ActivationStore, extract
    from mmsae.demo.stages import fit_method
    from mmsae.interpret.evidence.folder import Evidence
    from mmsae.sae import SAE, random_control, to_jumprelu
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
    saes = {"sae": sae, "random": random_control(sae, seed), "null": random_control(sae, seed + APART)}
    store = ActivationStore(folder / "store")
    rows = {m: store.load(modality=m) for m in sae.modalities}
    for name, own in saes.items():
        saes[name] = to_jumprelu(own, rows) if size.threshold else own
        saes[name].sites = sae.sites
        saes[name].save_pretrained(folder / name)
        evidence[name] = Evidence(_collect(folder / name, folder / "items", folder / f"evidence_{name}", host, seed))
    (root / "words.txt").write_text("\n".join(CONCEPTS) + "\n", encoding="utf-8")
    (root / "templates.txt").write_text("{}\n", encoding="utf-8")
    return _measured(evidence, saes, data, root, seed)


def _collect(sae: Path, shards: Path, out: Path, host: str, seed: int) -> Path:
    from mmsae.interpret.evidence.command import evidence
    from mmsae.options import call

    call(evidence, sae=str(sae), shards=str(shards), out=str(out), host=host, seed=seed, progress=False, workers=0)
    return out


def _measured(evidence: dict[str, Any], saes: dict[str, Any], data: Any, root: Path, seed: int) -> dict[str, Any]:
    from mmsae.interpret.names.job import Naming, write_named
    from mmsae.interpret.names.options import Looking
    from mmsae.types import IMAGE

    at = {u: i for i, u in enumerate(data.uids)}
    truth = {k: data.concepts[[at[u] for u in evidence[k].items.uid]] for k in ("sae", "random")}
    real, methods, named = meaning(evidence["sae"], truth["sae"]), {}, {}
    for method in METHODS:
        looking = Looking(() if method == "all" else (method,), str(root / "words.txt"), str(root / "templates.txt"),
                          modality="image")  # fmt: skip
        naming = {k: Naming(ev, looking, sae=saes[k]) for k, ev in evidence.items()}
        live = [naming[k].latents[IMAGE].tolist() for k in ("sae", "random")]
        for key, least in ((method, None), *(((CALIBRATED, naming["null"].least()),) if method == "all" else ())):
            found = {k: naming[k].run(least=least) for k in ("sae", "random")}
            methods[key] = figures(real, found["sae"].names, found["sae"].candidates, found["random"].names, live)
            if key == CALIBRATED:
                named, groups = found["sae"].names, live
                methods[key]["least"] = least[IMAGE]
                for k in found:
                    write_named(evidence[k].folder / "names", found[k], evidence[k].about["job"]["sae"])
    own, random = groups
    sets = {
        "clear": ("sae", [j for j in own if real.f1[:, j].max() >= CLEAR]),
        "named": ("sae", [j for j in own if named[j].name]), "live": ("sae", own), "random": ("random", random),
    }  # fmt: skip
    intruder = {}
    for judge in JUDGES:
        for group in GROUPS:
            kind, _, dealt = group.partition("_")
            which, latents = sets[kind]
            ev = evidence[which]
            choose = by_concepts(truth[which]) if judge == "truth" else by_embeddings(ev.embeddings(IMAGE))
            table = intruders(ev, latents, choose, bool(dealt), EACH, seed)
            intruder[f"{judge}_{group}"] = [[None if v != v else v for v in row] for row in table.tolist()]
    return {"methods": methods, "intruder": intruder}

"""Three-seed table of the SAEs on the generated world, with the goals beside the figures.

    mmsae demo --out runs/demo
    python benchmarks/world_table.py --demo runs/demo --out runs/world_table

Trains every method through ``mmsae fit`` on the demo's store, at two sizes and over several seeds, scores all of them
on the demo's held-out renders, and prints a markdown table (mean and, in brackets, standard deviation). Finished
runs are kept and not trained again.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from mmsae.demo.scores import world_pairs
from mmsae.demo.stages import PROFILES, SEEDS, fit_method
from mmsae.hosts import load_host
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE, random_control
from mmsae.types import TEXT
from mmsae.world.generator.captions import damage
from mmsae.world.measure.host import embed_texts
from mmsae.world.measure.score import score_sae

SIZES = {"F 128, k 8": (128, 8), "F 48, k 6": (48, 6)}
METHODS = ("paired_topk", "vl_sae", "shared_topk", "dual_topk")
UNCENTRED = ["--model.sae.init_args.normaliser.init_args.centre", "false"]
COLUMNS = {
    "FVU image": lambda m: m["fvu"]["image"],
    "FVU text": lambda m: m["fvu"]["text"],
    "pair": lambda m: m["code_cosine"]["pair"],
    "shuffled": lambda m: m["code_cosine"]["shuffled"],
    "F1 image": lambda m: m["concept_f1"]["image"],
    "F1 text": lambda m: m["concept_f1"]["text"],
    "F1 same": lambda m: m["concept_f1"]["same"],
    "AUC same": lambda m: m["concept_auc"]["same"],
    "agreement": lambda m: m["top_concept_agreement"],
    "bimodal energy": lambda m: m["bimodal"]["energy"],
    "R@1": lambda m: m["recall_at_1"],
    "dead": lambda m: m["dead_fraction"],
    "damage code": lambda m: m["mismatch"]["attribute"]["pair_code"],
    "damage weighted": lambda m: m["mismatch"]["attribute"]["pair_weighted"],
    "zero-shot code": lambda m: m["zero_shot"]["code"],
    "zero-shot recon": lambda m: m["zero_shot"]["recon"],
}


def cell(values):
    mean = statistics.fmean(values)
    return f"{mean:.3f} ({statistics.stdev(values):.3f})" if len(values) > 1 else f"{mean:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/world_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    state = json.loads((args.demo / "demo.json").read_text())
    profile = PROFILES[state["recipe"]["profile"]]
    host = load_host(f"local-dir:{args.demo / 'clip'}")
    train = world_pairs(args.demo / "store" / "train", profile.train, SEEDS["train"])
    test = world_pairs(args.demo / "store" / "test", profile.test, SEEDS["test"])
    damaged = embed_texts(host, damage(test.scenes, SEEDS["damage"])[0])
    jobs = [(size, name, name, []) for size in SIZES for name in METHODS]
    jobs += [("F 128, k 8", f"{name}, uncentred", name, UNCENTRED) for name in ("paired_topk", "vl_sae", "shared_topk")]
    rows, results = {}, {}
    for size, label, name, extra in jobs:
        latents, k = SIZES[size]
        scores = []
        for seed in args.seeds:
            run = args.out / f"{label.replace(', ', '_')}_{latents}_{seed}"
            if not (run / "sae").exists():
                sizes = ["--model.sae.init_args.d_sae", str(latents)]
                sizes += ["--model.sae.init_args.selector.init_args.k", str(k)]
                fit_method(name, args.demo / "store" / "train", run, profile.sae_steps, seed, False, [*sizes, *extra])
            sae = SAE.from_pretrained(run / "sae")
            scores.append(score_sae(sae, train, test, damaged, lambda t: embed_texts(host, t)))
            if name == "shared_topk" and not extra:
                control = random_control(sae, seed)
                control_scores = score_sae(control, train, test, damaged, lambda t: embed_texts(host, t))
                rows.setdefault((size, "random weights"), []).append(control_scores)
        rows[size, label] = scores
    for size in SIZES:
        print(f"\n{size}, {len(args.seeds)} seeds, mean (standard deviation)\n")
        shown = []
        for (s, label), scores in rows.items():
            if s == size:
                shown.append([label, *(cell([f(m) for m in scores]) for f in COLUMNS.values())])
                results[f"{size}: {label}"] = {c: [f(m) for m in scores] for c, f in COLUMNS.items()}
        print(markdown_table(["method", *COLUMNS], shown))
    clip = {k: v for k, v in scores[0]["mismatch"]["attribute"].items() if k.startswith("clip")}
    print(f"\nHost, damage AUROC: {clip}; embeddings of {test.x[TEXT].shape[1]} numbers")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.json").write_text(json.dumps({"rows": results, "host": clip}, indent=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""``mmsae demo``: a world with known concepts, a tiny CLIP, LLaVA and Stable Diffusion, SAEs on all, and what for.

Every stage writes its result whole or not at all and is skipped when it is there, so an interrupted demo goes on where
it stopped. Training goes through ``mmsae fit``. What concerns the LLaVA and the diffusion pipeline runs in processes of
their own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from mmsae.demo.stages import METHODS, PROFILES, SEEDS, fit_method, stage_log
from mmsae.files import write_json


def demo(
    out: str = "runs/demo", profile: Literal["default", "tiny"] = "default", seed: int = 0, progress: bool = True
) -> str:
    """Train, compare and use multimodal SAEs on a generated world, end to end, on the CPU.

    Args:
        out: Folder for everything; the same command goes on where it was interrupted.
        profile: ``default`` reaches the documented figures; ``tiny`` is quick and rough.
        seed: Seed of the models; the world is always the same.
        progress: Show progress bars.

    Returns:
        The path of the report.
    """
    from mmsae.activations import extract
    from mmsae.demo import diffusion as demo_diffusion
    from mmsae.demo import llava as demo_llava
    from mmsae.demo import tiny_hosts
    from mmsae.demo.browse import PAGE, browse, collect
    from mmsae.demo.filter import RESULTS as FILTERED
    from mmsae.demo.filter import filter_damaged, write_damaged
    from mmsae.demo.ood import RESULTS as DETECTED
    from mmsae.demo.ood import detect_ood, make_card
    from mmsae.demo.report.page import write_report
    from mmsae.demo.scores import score
    from mmsae.jobs.processes import SideProcess
    from mmsae.options import call
    from mmsae.report import names_of
    from mmsae.world.generator.shards import write_world
    from mmsae.world.models.command import pretrain_clip

    p, root = PROFILES[profile], Path(out)
    root.mkdir(parents=True, exist_ok=True)
    stages = stage_log(root / "demo.json", {"profile": profile, "seed": seed, **p._asdict(), "format": 2})
    print(
        f"mmsae demo, profile {profile}: {p.train:,} generated image-text pairs -> a tiny CLIP -> {len(METHODS)} SAEs "
        "-> a damaged set filtered; a tiny LLaVA -> 2 SAEs -> its hallucination; a tiny Stable Diffusion -> an SAE "
        "-> steered; report. "
        f"About {p.minutes:g} minutes on two cores and 250 MB in {root}.",
        flush=True,
    )
    for split, n in (("train", p.train), ("test", p.test)):
        stages.run(
            f"world_{split}",
            lambda split=split, n=n: write_world(root / "shards" / split, n, SEEDS[split], split, progress=progress),
        )
    train_shards = str(root / "shards" / "train")
    beside: dict[str, SideProcess] = {}

    def start_beside(name: str, module: Any, what: str) -> None:
        if not (root / module.RESULTS).exists():
            beside[name] = SideProcess(module.MODULE, root / module.LOG, what, root, profile, seed)
            print(f"[{name}] and what follows from it: in another process, see {root / module.LOG}", flush=True)

    try:
        start_beside("diffusion", demo_diffusion, "drawing")
        stages.run(
            "clip",
            lambda: call(pretrain_clip, shards=train_shards, out=str(root / "clip"), steps=p.clip_steps, seed=seed,
                         progress=progress),
        )  # fmt: skip
        start_beside("llava", demo_llava, "vision-language")
        for split in ("train", "test"):
            stages.run(
                f"extract_{split}",
                lambda split=split: extract(f"local-dir:{root / 'clip'}", str(root / "shards" / split),
                                            root / "store" / split, progress=progress),
            )  # fmt: skip
        for name in METHODS:
            stages.run(
                f"fit_{name}",
                lambda name=name: fit_method(name, root / "store" / "train", root / name, p.sae_steps, seed, progress),
            )
        start = time.perf_counter()
        results = score(root, p, seed)
        scored = round(time.perf_counter() - start, 2)
        stages.run("damaged", lambda: write_damaged(root, p.damaged))
        names = names_of(results["methods"]["paired_topk"]["concepts"])
        stages.run("filter", lambda: filter_damaged(root, "paired_topk", names, progress))
        stages.run("card", lambda: make_card(root, seed))
        stages.run("ood", lambda: detect_ood(root, p.damaged, p.sae_steps * 5 // 8, seed, progress))
        stages.run("evidence", lambda: collect(root, seed, progress))
        stages.run("browser", lambda: browse(root, progress))
        for name, process in beside.items():
            stages.run(f"waiting_for_{name}", process.wait)
    finally:
        for process in beside.values():
            process.stop()
    results["filter"] = json.loads((root / FILTERED).read_text())
    results["ood"] = json.loads((root / DETECTED).read_text())
    for key, module in (("hallucination", demo_llava), ("steering", demo_diffusion)):
        took = json.loads((root / module.STATE).read_text())["seconds"]
        results[key] = json.loads((root / module.RESULTS).read_text()) | {"seconds": took}
    seconds = stages.seconds | {"score": scored}
    results |= {"seconds": seconds, "profile": profile, "seed": seed}
    write_json(root / "results.json", results)
    report = write_report(root, results)
    if (profile, seed) == ("default", 0):
        tiny_hosts.keep({name: root / name for name in ("clip", "llava", "diffusion", "probe")})
    total = sum(seconds.values())
    print(f"figures: {root / 'results.json'}   ({total:.0f} s in all)\nbrowser: {root / PAGE}\nreport:  {report}")
    return str(report)

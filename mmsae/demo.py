"""``mmsae demo``: a world with known concepts, a tiny CLIP trained on it, SAEs on the CLIP, and what they found.

Every stage writes its result whole or not at all and is skipped when it is there, so an interrupted demo goes on where
it stopped. Training goes through ``mmsae fit``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mmsae.files import atomic_file
from mmsae.recipes import find_recipe
from mmsae.types import IMAGE, TEXT, InputError

METHODS = ("paired_topk", "vl_sae", "shared_topk")
RANDOM = "random"


class Profile(NamedTuple):
    """Sizes of a demo.

    Attributes:
        train: Training samples.
        test: Held-out samples.
        clip_steps: Steps of the CLIP.
        sae_steps: Steps of each SAE.
        minutes: About how long it takes on two cores.
    """

    train: int
    test: int
    clip_steps: int
    sae_steps: int
    minutes: float


PROFILES = {"tiny": Profile(8000, 1500, 120, 300, 1.0), "default": Profile(20000, 3000, 400, 800, 2.5)}
SEEDS = {"train": 1, "test": 2, "damage": 3}  # of the world; the demo's own seed is that of the models


class Stages:
    """Runs stages once, and remembers in ``DIR/demo.json`` which are done and how long they took.

    Raises:
        InputError: The folder holds a demo of another profile, seed or version of the demo.
    """

    def __init__(self, out: Path, recipe: dict[str, Any]):
        self.file = out / "demo.json"
        key = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.state: dict[str, Any] = {"recipe": recipe, "key": key, "seconds": {}}
        if self.file.exists():
            found = json.loads(self.file.read_text())
            if found["key"] != key:
                raise InputError(
                    f"{out} holds a demo of {found['recipe']}, this one is {recipe}: give another --out, or remove it"
                )
            self.state = found

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Run ``work`` unless it is done; its seconds are added up over interruptions that it survives."""
        if name in self.state["seconds"]:
            print(f"[{name}] done before ({self.state['seconds'][name]:.0f} s)")
            return
        print(f"[{name}]", flush=True)
        start = time.perf_counter()
        work()
        self.state["seconds"][name] = round(time.perf_counter() - start, 2)
        with atomic_file(self.file) as temp:
            temp.write_text(json.dumps(self.state, indent=2))


def fit_method(
    name: str, store: Path, run: Path, steps: int, seed: int, progress: bool = True, extra: Sequence[str] = ()
) -> None:
    """``mmsae fit`` of one of the world's recipes, going on from its last checkpoint if there is one.

    Args:
        name: ``configs/train/world_NAME.yaml``.
        store: Activation store.
        run: Run folder; the SAE comes to ``run/sae``.
        steps: Training steps.
        seed: Of weights.
        progress: Show the bar.
        extra: More command-line arguments.
    """
    from mmsae.training.cli import run as lightning

    args = ["fit", "-c", find_recipe(f"configs/train/world_{name}.yaml"), "--data.store", str(store)]
    args += ["--trainer.default_root_dir", str(run), "--trainer.max_steps", str(steps), "--seed_everything", str(seed)]
    args += ["--trainer.val_check_interval", str(min(200, steps))]
    args += ["--trainer.enable_progress_bar", str(progress).lower(), *extra]
    if (run / "checkpoints" / "last.ckpt").exists():
        args += ["--ckpt_path", "last"]
    lightning(args)


def world_pairs(store: Path, n: int, seed: int):
    """A store of the generated world joined with the truth about it, by uid order of generation."""
    from mmsae.cache import ActivationStore
    from mmsae.world.captions import full_captions
    from mmsae.world.scene import sample_scenes
    from mmsae.world.score import WorldPairs

    activations = ActivationStore(store)
    scenes = sample_scenes(n, seed)
    captions = full_captions(scenes)
    if list(activations.captions) != captions:
        raise InputError(f"{store} does not hold the {n} samples of world seed {seed}; remove it")
    return WorldPairs({m: activations.load(modality=m) for m in (IMAGE, TEXT)}, scenes, captions)


def _score(out: Path, profile: Profile, seed: int) -> dict[str, Any]:
    """All figures of the demo."""
    from mmsae.backbones import load_backbone
    from mmsae.metrics.correlation import PairScorer
    from mmsae.sae import SAE, random_control
    from mmsae.world.captions import damage
    from mmsae.world.evaluate import embed_texts, recall_at_1, zero_shot_attributes
    from mmsae.world.score import encode_pairs, score_sae

    host = load_backbone(f"local-dir:{out / 'clip'}")
    train = world_pairs(out / "store" / "train", profile.train, SEEDS["train"])
    test = world_pairs(out / "store" / "test", profile.test, SEEDS["test"])

    def embed(texts: list[str]) -> torch.Tensor:
        return embed_texts(host, texts)

    damaged = embed(damage(test.scenes, SEEDS["damage"])[0])
    saes = {name: SAE.from_pretrained(out / name / "sae") for name in METHODS}
    for sae in saes.values():
        sae.attach(host)
    saes[RANDOM] = random_control(saes["shared_topk"], seed)  # tied, so its random atoms fit its random encoder
    methods = {}
    for name, sae in saes.items():
        print(f"  scoring {name}", flush=True)
        methods[name] = score_sae(sae, train, test, damaged, embed)
    head = {m: x[:1000] for m, x in test.x.items()}
    z = encode_pairs(saes["paired_topk"], train)
    torch.save(  # tensors for the report, so that it can be drawn again without scoring
        {"correlation": PairScorer.fit(z[IMAGE], z[TEXT]).weights, "damaged": damaged}, out / "report.pt"
    )
    host_scores = {
        kind: {k: v for k, v in scores.items() if k.startswith("clip")}
        for kind, scores in methods["paired_topk"]["mismatch"].items()
    }
    for scores in methods.values():
        for kind in scores["mismatch"].values():
            for k in ("clip", "clip_centred"):
                kind.pop(k)
    return {
        "clip": {
            "zero_shot": zero_shot_attributes(test.x[IMAGE], test.scenes, embed),
            "recall_at_1": recall_at_1(head[IMAGE], head[TEXT], test.captions[:1000]),
        },
        "methods": methods,
        "mismatch": host_scores,
        "zero_shot": methods["paired_topk"]["zero_shot"],
    }


def demo(
    out: str = "runs/demo", profile: Literal["default", "tiny"] = "default", seed: int = 0, progress: bool = True
) -> str:
    """Train and compare multimodal SAEs on a generated world, end to end, on the CPU.

    Args:
        out: Folder for everything; the same command goes on where it was interrupted.
        profile: ``default`` reaches the documented figures; ``tiny`` is quick and rough.
        seed: Of the models; the world is always the same.
        progress: Show progress bars.

    Returns:
        The path of the report.
    """
    from mmsae.cache import extract
    from mmsae.demo_report import write_report
    from mmsae.world.clip import pretrain_clip
    from mmsae.world.shards import write_world

    p, root = PROFILES[profile], Path(out)
    root.mkdir(parents=True, exist_ok=True)
    stages = Stages(root, {"profile": profile, "seed": seed, **p._asdict(), "format": 1})
    print(
        f"mmsae demo, profile {profile}: {p.train:,} generated image-text pairs -> a tiny CLIP -> {len(METHODS)} SAEs "
        f"-> report. About {p.minutes:g} minutes on two cores and 150 MB in {root}.",
        flush=True,
    )
    for split, n in (("train", p.train), ("test", p.test)):
        stages.run(
            f"world_{split}",
            lambda split=split, n=n: write_world(root / "shards" / split, n, SEEDS[split], split, progress=progress),
        )
    train_shards = str(root / "shards" / "train")
    stages.run(
        "clip",
        lambda: pretrain_clip(train_shards, str(root / "clip"), steps=p.clip_steps, seed=seed, progress=progress),
    )
    for split in ("train", "test"):
        stages.run(
            f"extract_{split}",
            lambda split=split: extract(
                f"local-dir:{root / 'clip'}", str(root / "shards" / split), root / "store" / split, progress=progress
            ),
        )
    for name in METHODS:
        stages.run(
            f"fit_{name}",
            lambda name=name: fit_method(name, root / "store" / "train", root / name, p.sae_steps, seed, progress),
        )
    results: dict[str, Any] = {}
    start = time.perf_counter()
    results = _score(root, p, seed)
    seconds = stages.state["seconds"] | {"score": round(time.perf_counter() - start, 2)}
    results |= {"seconds": seconds, "profile": profile, "seed": seed}
    with atomic_file(root / "results.json") as temp:
        temp.write_text(json.dumps(results, indent=2))
    report = write_report(root, results)
    total = sum(seconds.values())
    print(f"figures: {root / 'results.json'}   ({total:.0f} s in all)\nreport:  {report}")
    return str(report)

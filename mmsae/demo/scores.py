"""Figures of the demo's SAEs on held-out pairs of the world, beside those of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmsae.activations import ActivationStore
from mmsae.demo.stages import METHODS, SEEDS, Profile
from mmsae.errors import InputError
from mmsae.hosts import load_host
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.sae import SAE, random_control
from mmsae.types import IMAGE, TEXT
from mmsae.world.generator.captions import damage, full_captions
from mmsae.world.generator.scene import sample_scenes
from mmsae.world.measure.host import embed_texts, recall_at_1, zero_shot_attributes
from mmsae.world.measure.score import WorldPairs, encode_pairs, score_sae

RANDOM = "random"


def world_pairs(store: Path, n: int, seed: int) -> WorldPairs:
    """A store of the generated world joined with the truth about it, by uid order of generation."""
    activations = ActivationStore(store)
    scenes = sample_scenes(n, seed)
    captions = full_captions(scenes)
    if list(activations.captions) != captions:
        raise InputError(f"{store} does not hold the {n} samples of world seed {seed}; remove it")
    return WorldPairs({m: activations.load(modality=m) for m in (IMAGE, TEXT)}, scenes, captions)


def score(out: Path, profile: Profile, seed: int) -> dict[str, Any]:
    """All figures of the demo."""
    host = load_host(f"local-dir:{out / 'clip'}")
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

"""The part of ``mmsae demo`` about a vision-language model: a tiny LLaVA, an SAE on its tokens, and hallucination.

It needs nothing but the CLIP and runs as a process of its own, beside the stages of the CLIP's SAEs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmsae.demo.curves import last_validation
from mmsae.demo.stages import PROFILES, SEEDS, Profile, fit_method, fit_recipe, stage_log
from mmsae.files import write_json
from mmsae.jobs.processes import main
from mmsae.options import call

SITE = "layers.1:out"  # of three layers
MODULE, LOG, STATE, RESULTS = "mmsae.demo.llava", "llava.log", "llava.json", "llava_results.json"
KINDS = ("random", "adversarial")
WORDS = 12  # latents whose words are listed


def write_talk(out: Path, n: int, seed: int) -> None:
    """Shards of conversations about images: every other one a caption, the others a question about an object."""
    from mmsae.world.generator.data import generate
    from mmsae.world.generator.shards import write_samples
    from mmsae.world.models.llava.questions import DESCRIBE, NO, YES, object_questions

    data = generate(n, seed, siblings=False)
    asked = object_questions(data.scenes, seed, "adversarial")

    def meta(i: int) -> dict[str, Any]:
        q = 2 * i + i // 2 % 2  # the questions of image i are rows 2i (true) and 2i + 1
        own = (asked.texts[q], YES if asked.answers[q] else NO) if i % 2 else (DESCRIBE, data.full[i])
        return data.meta(i) | dict(zip(("question", "answer"), own, strict=True))

    write_samples(out, "talk", data.images, data.full, map(meta, range(n)))


def fit_concepts(host: str, shards: list[str], root: Path, steps: int, seed: int) -> None:
    """VL-SAE for a vision-language model: mean states of captioned images, an aligner, an SAE on aligned states."""
    import lightning.pytorch as pl
    import torch

    from mmsae.activations import ActivationStore, StoreLoader, extract, write_store
    from mmsae.sae.aligner import Aligner
    from mmsae.training.aligner import LitAligner

    sites = [f"{SITE}[image_mean]", f"{SITE}[text_mean]"]
    extract(host, shards, root / "means", sites=sites, batch_size=100, workers=0, progress=False)
    store = ActivationStore(root / "means")
    torch.manual_seed(seed)
    lit = LitAligner(Aligner(store.d_in), lr=3e-3)
    trainer = pl.Trainer(
        max_epochs=20, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(lit, StoreLoader(store, 256, seed=seed))
    aligner = lit.aligner.eval()
    aligner.save_pretrained(root / "aligner")
    with torch.no_grad():
        x = {m: aligner.align(store.load(modality=m), m) for m in store.modalities}
    shutil.rmtree(root / "aligned", ignore_errors=True)  # of an interrupted run
    write_store(root / "aligned", x, list(store.uids), sites=store.sites, captions=list(store.captions))
    fit_method(
        "vl_sae", root / "aligned", root / "llava_concepts", steps, seed, False,
        ["--model.sae.init_args.d_sae", "256"],
    )  # fmt: skip


def measure(host: str, root: Path, p: Profile, seed: int) -> dict[str, Any]:
    """Figures of the vision-language part: yes/no questions, cross-entropy recovered, weights, words of latents."""
    from mmsae.load import load_pair
    from mmsae.lvlm.recovered import ce_recovered
    from mmsae.lvlm.weights.file import load_weights
    from mmsae.world.generator.data import generate
    from mmsae.world.models.llava.questions import DESCRIBE, pil_images

    table = {kind: ask_pope(host, kind, root, p, seed) for kind in KINDS}
    held = generate(100, SEEDS["talk_test"], siblings=False)
    sae, loaded = load_pair(root / "llava_tokens" / "sae", host, device="cpu")
    collate, n = loaded.collator("question+answer"), len(held.full)
    prompts = {"image_text": pil_images(held.images), "text": [None] * n}
    batches = {k: collate.batch([DESCRIBE] * n, v, answers=held.full) for k, v in prompts.items()}
    info = load_weights(root / "weights").info
    return {
        "pope": table,
        "token_sae": last_validation(root / "llava_tokens"),
        "ce_recovered": {k: ce_recovered(loaded, sae, [b])._asdict() for k, b in batches.items()},
        "weights": {k: info[k] for k in ("coverage", "weighted", "mean_weight", "classes", "tokens")},
        "latents": words_of_latents(loaded, sae, root),
        "llava": json.loads((root / "llava" / "training.json").read_text()) | {"curve": None},
    }


def ask_pope(host: str, kind: str, root: Path, p: Profile, seed: int) -> dict[str, dict[str, float]]:
    """``{method: figures}`` of questions about held-out images, half of them true."""
    import numpy as np

    from mmsae.lvlm.decoding.settings import PRESETS
    from mmsae.lvlm.hallucination.pope import pope
    from mmsae.lvlm.hallucination.questions import Question, save_questions
    from mmsae.metrics.host.hallucination import NO, YES
    from mmsae.shards import FaultLog, expand, read_shard
    from mmsae.world.generator.scene import sample_scenes
    from mmsae.world.models.llava.questions import OBJECTS, object_questions

    shard = expand(str(root / "shards" / "test"))[0]
    uids = [s.uid for s in read_shard(shard, FaultLog(), need=(), decode=False)][: p.questions]
    scenes = sample_scenes(p.test, SEEDS["test"]).rows(np.arange(len(uids)))
    q = object_questions(scenes, seed, kind)
    rows = zip(q.row.tolist(), q.texts, q.answers.tolist(), q.objects.tolist(), strict=True)
    file = root / "pope" / f"{kind}.json"
    save_questions(
        [Question(i + 1, uids[r], text, YES if a else NO, OBJECTS[o]) for i, (r, text, a, o) in enumerate(rows)], file
    )
    found = call(
        pope, host=host, shards=shard, out=str(root / "pope" / kind), sae=str(root / "llava_concepts" / "sae"),
        aligner=str(root / "aligner"), methods=["concept"], questions=str(file),
        settings=PRESETS["pope"]._replace(max_new_tokens=2), batch_size=100, seed=seed, device="cpu", progress=False,
    )  # fmt: skip
    return {method: parsed["official"] for method, parsed in found["table"][kind].items()}


def words_of_latents(host: Any, sae: Any, root: Path) -> list[dict[str, Any]]:
    """The latents of largest cross-modal weight: what they are called by the words on which they fire most."""
    import torch

    from mmsae.lvlm.tokens import encode_tokens, segment_sites
    from mmsae.lvlm.weights.file import load_weights
    from mmsae.shards import FaultLog, expand, read_shard
    from mmsae.types import IMAGE, TEXT

    file = load_weights(root / "weights")
    ids = file.weights.nan_to_num(-2).argsort(descending=True)[:WORDS]
    talk = [s for path in expand(str(root / "talk" / "test")) for s in read_shard(path, FaultLog())][:200]
    batch = host.collator("question+answer")(talk)
    with torch.no_grad():
        tokens = host.capture(batch, segment_sites(sae, host))
        z = {m: c.gather(ids) for m, c in encode_tokens(sae, tokens).items()}
    start = (batch.inputs["attention_mask"] == 0).sum(1)[tokens.item[TEXT].cpu()]  # padding stands on the left
    words = batch.inputs["input_ids"][tokens.item[TEXT].cpu(), start + tokens.position[TEXT].cpu()]
    unique, inverse = words.unique(return_inverse=True)
    mean = torch.zeros(len(unique), len(ids)).index_add_(0, inverse, z[TEXT].float())
    mean /= inverse.bincount()[:, None]
    names = host.processor.tokenizer.convert_ids_to_tokens(unique.tolist())
    kinds = file.tensors["class"]
    out = []
    for c, j in enumerate(ids.tolist()):
        best = [i for i in mean[:, c].argsort(descending=True)[:4].tolist() if mean[i, c] > 0]
        rates = {m: (z[m][:, c] > 0).float().mean().item() for m in (IMAGE, TEXT)}
        weight = file.weights[j].item()
        out.append({"latent": j, "weight": weight, "class": int(kinds[j]), "words": [names[i] for i in best], **rates})
    return out


def run(root: Path, profile: str, seed: int) -> None:
    """All stages; those that are done are skipped."""
    from mmsae.lvlm.weights.job import cross_modal_weights
    from mmsae.shards import expand
    from mmsae.world.models.llava.model import train_llava

    p = PROFILES[profile]
    stages = stage_log(root / STATE, {"profile": profile, "seed": seed, **p._asdict(), "format": 1})
    host, tokens = f"lvlm:{root / 'llava'}", root / "llava_tokens"
    stages.run(
        "llava",
        lambda: call(train_llava, data=p.llava_images, clip=str(root / "clip"), out=str(root / "llava"),
                     steps=p.llava_steps, seed=seed, data_seed=SEEDS["train"], overwrite=True, progress=False),
    )  # fmt: skip
    for split, n in (("train", p.talk), ("test", 400)):
        seed_of = SEEDS["talk" if split == "train" else "talk_test"]
        stages.run(f"talk_{split}", lambda split=split, n=n, s=seed_of: write_talk(root / "talk" / split, n, s))
    data = [f"--data.{k}={v}" for k, v in (("shards", root / "talk/train"), ("val_shards", root / "talk/test"))]
    extra = [*data, f"--data.host={host}", "--trainer.val_check_interval", str(p.token_steps)]
    stages.run("fit_llava_tokens", lambda: fit_recipe("llava_tokens", tokens, p.token_steps, seed, False, extra))
    stages.run(
        "weights",
        lambda: call(cross_modal_weights, host=host, sae=str(tokens / "sae"), shards=str(root / "talk" / "train"),
                     out=root / "weights", text="question+answer", samples=500, batch_size=50, device="cpu",
                     progress=False),
    )  # fmt: skip
    means = expand(str(root / "shards" / "train"))[: max(2, p.talk // 1000)]
    stages.run("fit_llava_concepts", lambda: fit_concepts(host, means, root, p.sae_steps // 2, seed))
    stages.run("hallucination", lambda: write_json(root / RESULTS, measure(host, root, p, seed)))


if __name__ == "__main__":
    main(run)

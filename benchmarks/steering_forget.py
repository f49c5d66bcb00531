"""Unlearning by SAeUron's edit, and detect-and-replace beside it, for ``benchmarks/steering.py``."""

from itertools import product

import numpy as np
import torch

from mmsae.steering import attach
from mmsae.steering.measure.controls import controls
from mmsae.steering.measure.images import kid, unlearning
from mmsae.steering.measure.sweep import Condition
from mmsae.steering.methods.detect_and_replace import from_prompts, replacement
from mmsae.steering.methods.unlearn import above_percentile, at_steps, forget, latents, selection_score, tune
from mmsae.world.generator.scene import COLOURS
from mmsae.world.measure.scorers import asked, probed
from mmsae.world.models.diffusion.evaluate import draw_prompts

CONCEPTS = ("red", "green", "blue")
OPTIONS = {"steps": 20, "guidance": 3.0}
REPORT = (1000, 2000, 3000)  # first seeds


def mixed(concept, seed, used=(), n=12, others=3):
    """``n`` different prompts of a concept, and ``others`` of every other colour; none of those that are used."""
    out = []
    for c in COLOURS:
        texts = [t for t in dict.fromkeys(draw_prompts(200, seed, c, vary=True).texts) if t not in set(used)]
        out += texts[: n if c == concept else others]
    return out


def prompts_of(concept):
    """Prompts for tuning, and others for the report: twelve of the concept in each."""
    texts = mixed(concept, 51)
    return texts, mixed(concept, 52, texts, others=6)


def judge(b, pictures, texts, concept, before=None):
    """UA, IRA and CRA by pixels, IRA and UA by the classifier, and what else changed."""
    words, ok = [t.split()[2] for t in texts], asked("colour")(pictures, texts)
    u = unlearning(ok.bool(), words, concept, {"background": asked("background")(pictures, texts).bool()})
    if before is None:
        return u
    hit = torch.tensor([w == concept for w in words])
    again = unlearning(probed(b.probe, "colour")(pictures, texts).bool(), words, concept)
    e = b.judge.images(pictures), b.judge.images(before)
    moved = (pictures - before).square().flatten(1).mean(1).sqrt()
    return {
        "ua": u.ua, "ira": u.ira, "cra": u.cra, "classifier ua": again.ua, "classifier ira": again.ira,
        "background of target": asked("background")(pictures, texts)[hit].mean().item(),
        "kid of target": kid(e[0][hit], e[1]), "kid unsteered target": kid(e[1][hit], e[1]),
        "moved target": moved[hit].mean().item(), "moved others": moved[~hit].mean().item(),
    }  # fmt: skip


def average(b, way, texts, concept, seeds=REPORT):
    """Figures of a way of steering, mean over seeds, and its log's."""
    rows = []
    for seed in seeds:
        each = [seed + i for i in range(len(texts))]
        before = b.plain(texts, each)
        context = way(texts, each) if callable(way) else attach(b.host, way)
        with context as log:
            pictures = b.host.generate(texts, seed=each, batch_size=len(texts), **OPTIONS)
        rows.append(judge(b, pictures, texts, concept, before) | {"|dx|/|x|": log.relative, "share": log.share})
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]} | {
        "ua by seed": [r["ua"] for r in rows], "ira by seed": [r["ira"] for r in rows]
    }  # fmt: skip


def unlearn(b):
    """Setting by concept on a tuning seed, figures on three others, twenty random controls."""
    out = {}
    for c in CONCEPTS:
        texts, new = prompts_of(c)

        def measure(edits, c=c, texts=texts):
            return judge(b, b.draw(texts, at_steps(b.block_site, b.block, edits))[0], texts, c)

        tried = tune(b.concepts, c, measure, (98.5, 99.5), (-5.0, -10.0, -20.0, -30.0))
        best = tried[0]
        edits = forget(b.concepts, c, best.percentile, best.gamma)
        way = at_steps(b.block_site, b.block, edits)
        found = average(b, way, new, c)
        random = controls([Condition("forget", best.gamma, way)], 20, b.block_stats.live())
        pool = [average(b, a.steering, new[::2], c, REPORT[:1]) for a in random]
        out[c] = found | {"unsteered": average(b, [], new, c)} | {
            "percentile": best.percentile, "gamma": best.gamma, "tuning objective": best.result.objective,
            "features": latents(edits), "random ua": [p["ua"] for p in pool], "random ira": [p["ira"] for p in pool],
        }  # fmt: skip
    return out


def detect_and_replace(b):
    """The same prompts with activations from a donor where the concept is detected; thresholds from the tuning seed."""
    out = {}
    for c in CONCEPTS:
        texts, new = prompts_of(c)
        target, others = b.concepts.split(c)
        score = selection_score(target, others).mean(0)
        tuned = {}
        ids = above_percentile(score, 99.0).sort().values
        for k, dilate, donor in product((1.0, 4.0), (0, 1), ("prompt", "mean")):
            way = ways(b, ids.tolist(), (k * target.mean(0)[ids]).tolist(), dilate, c, donor)
            each = [900 + i for i in range(len(texts))]
            with way(texts, each):
                pictures = b.host.generate(texts, seed=each, batch_size=len(texts), **OPTIONS)
            tuned[donor, k, dilate] = judge(b, pictures, texts, c).objective
        out[c] = {}
        for donor in ("prompt", "mean"):
            best = max((s for s in tuned if s[0] == donor), key=tuned.get)
            way = ways(b, ids.tolist(), (best[1] * target.mean(0)[ids]).tolist(), best[2], c, donor)
            setting = {"tau": best[1], "dilate": best[2], "tuning objective": tuned[best], "features": ids.tolist()}
            out[c][donor] = average(b, way, new, c) | setting
    return out


def ways(b, ids, tau, dilate, concept, donor):
    """A way of steering by replacement; the donor of ``prompt`` is drawn from the prompt without the colour's word."""
    if donor == "prompt":
        return from_prompts(
            b.host, b.block_site, b.block, ids, tau, lambda p: p.replace(f" {concept} ", " "), dilate, **OPTIONS
        )
    return lambda texts, seeds: attach(b.host, {b.block_site: (b.block, replacement(ids, tau, "mean", dilate))})

"""The claims about steering, measured on the tiny text-to-image pipeline of the generated world.

    python benchmarks/steering.py --out runs/steering

Text encoder, one block of the denoiser under a mask, unlearning, detect-and-replace, attribute discovery, and VS2 on
the world's CLIP. Features, strengths and thresholds are chosen on tuning prompts and a tuning seed; figures are of
other prompts and three other seeds. Success is scored by pixel arithmetic and by a classifier that saw renders only.
About eleven CPU-minutes with the hosts in the cache; parts that are done are read from OUT. ``--seed`` draws captions,
prompts and random features of attribute discovery anew, of an SAE of its own.
"""

import argparse
import json
import time
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from steering_clip import clip_vs2
from steering_forget import detect_and_replace, unlearn
from steering_saes import TEXT_SITE, block_rows, captions, fvu, load_or_train, text_rows, train

from mmsae.demo import tiny_hosts
from mmsae.files import atomic_file
from mmsae.hosts import load_host
from mmsae.metrics.statistics import interval
from mmsae.report.figures import write_png
from mmsae.sae import random_control
from mmsae.steering import FeatureStats, Intervention, attach
from mmsae.steering.edits.edit import Edit
from mmsae.steering.measure.controls import controls
from mmsae.steering.measure.plots import before_after, dose_plot
from mmsae.steering.measure.scorers import CLIPJudge, after, inside, kept, towards
from mmsae.steering.measure.sweep import Item, collect, doses, noise, sweep, verdicts
from mmsae.steering.methods.attributes import SteeredPairs, clip_choice, confirm, discover, gains, score_words
from mmsae.steering.methods.denoiser_block import paint
from mmsae.steering.methods.text import substitute, text_codes, word_pair
from mmsae.steering.methods.unlearn import concept_stats, selection_score
from mmsae.world.generator.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES
from mmsae.world.measure.scorers import asked, colour, probed
from mmsae.world.models.diffusion.evaluate import draw_prompts

BLOCK = "unet.up_blocks.1.attentions.1:update"  # of all attention updates the one that carries the colour
PAIRS = (("red", "blue"), ("green", "purple"), ("yellow", "cyan"))
SEEDS, TUNING = (1, 2, 3), 900
DRAW = {"steps": 20, "guidance": 3.0}
PUSH = 1.0  # |dx| / |x| of single features in attribute discovery
DIRECTIONS = 40  # random ones that go through attribute discovery
LEFT = torch.tensor([[1.0, 0.0]])


def prompts(colour_name, n, seed, used=()):
    """Different prompts of a colour (None: all colours balanced), none of those that are used."""
    texts = draw_prompts(6 * n, seed, colour_name, vary=True).texts
    return [t for t in dict.fromkeys(texts) if t not in set(used)][:n]


class Bench:
    """The hosts, the SAEs and the folder."""

    def __init__(self, out, diffusion, seed=0):
        self.out, self.t0, self._plain, self.seed = out, time.process_time(), {}, seed
        self.host = load_host(f"diffusers:{diffusion or tiny_hosts.diffusion()}")
        self.clip = load_host(f"local-dir:{tiny_hosts.clip()}")
        self.judge, self.probe = CLIPJudge(self.clip), str(tiny_hosts.probe())
        self.text_site, self.block_site = self.host.site(TEXT_SITE), self.host.site(BLOCK)
        self.captions = captions(5000, 11 + 1000 * seed)
        rows = text_rows(self.host, self.captions)
        self.text = load_or_train(out / "sae-text", lambda: train(rows, self.text_site, seed=seed))
        self.text_stats = FeatureStats.of_codes([self.text.encode(rows)])
        self.saes = {"fvu text": fvu(self.text, rows)}

    @cached_property
    def block(self):
        """The SAE of the block."""
        rows = block_rows(self.host, BLOCK, captions(256, 12), **DRAW)
        sae = load_or_train(self.out / "sae-block", lambda: train(rows, self.block_site, steps=1200))
        self.block_stats, self.saes["fvu block"] = FeatureStats.of_codes([sae.encode(rows)]), fvu(sae, rows)
        return sae

    @cached_property
    def concepts(self):
        """Mean codes of the block by colour and step, of sixteen anchors each."""
        anchors = {c: prompts(c, 16, 21) for c in COLOURS}
        return concept_stats(self.host, self.block, self.block_site, anchors, seed=500, batch_size=48, **DRAW)

    def plain(self, texts, seeds):
        """Unsteered pictures, drawn once."""
        key = (tuple(texts), tuple(seeds))
        if key not in self._plain:
            self._plain[key] = self.host.generate(texts, seed=seeds, batch_size=len(texts), **DRAW)
        return self._plain[key]

    def draw(self, texts, way=(), seed=TUNING):
        """Pictures under what ``attach`` takes, and its log; every prompt has its own noise."""
        with attach(self.host, list(way.items() if hasattr(way, "items") else way)) as log:
            seeds = [seed + i for i in range(len(texts))]
            return self.host.generate(texts, seed=seeds, batch_size=len(texts), **DRAW), log


def rates(pictures, texts, source, target):
    """Shares of pictures that show the source colour, the target colour and the background asked for."""
    found = {"source": colour(source), "target": colour(target), "background": asked("background")}
    return {k: f(pictures, texts).mean().item() for k, f in found.items()}


def text_encoder(b):
    """One word for another in the text encoder's codes."""
    pairs, tuned = {}, {}
    for source, target in PAIRS:
        own = [t for t in b.captions if f" {source} " in t][:300]
        pairs[source] = word_pair(b.host, b.text, b.text_site, own, [t.replace(source, target) for t in own])
        texts = prompts(source, 8, 7)
        for n in (4, 8, 16, 32):
            for s in (1.0, 1.5, 2.0, 3.0):
                pictures, _ = b.draw(texts, {b.text_site: (b.text, substitute(pairs[source], n, s))})
                tuned.setdefault((n, s), []).append(rates(pictures, texts, source, target))
    score = {k: np.mean([r["target"] + 0.5 * r["background"] for r in v]) for k, v in tuned.items()}
    n, best = max(score, key=lambda k: (score[k], -k[1], -k[0]))
    out = {"n": n, "strength": best, "tuning": {f"{k}": float(v) for k, v in score.items()}}
    for source, target in PAIRS:
        pair, texts = pairs[source], prompts(source, 12, 8, prompts(source, 8, 7))
        arms = doses(
            "swap",
            sorted({0.5, 1.0, 1.5, 2.0, 3.0, best}),
            lambda s, p=pair: {b.text_site: (b.text, substitute(p, n, s))},
        )
        arms += controls([a for a in arms if a.strength == best], 20, b.text_stats.live())
        metrics = {
            "target": after(colour(target)), "source": after(colour(source)), "background": after(asked("background")),
            "classifier": after(probed(b.probe, "colour", target)), "shape kept": _same_shape(b.probe),
            "towards": towards(b.judge, lambda p, s=source, t=target: p.replace(s, t)), "kept": kept(b.judge),
        }  # fmt: skip
        pictures = {}
        seen = collect([Item(p, noise(SEEDS[0], i)) for i, p in enumerate(texts[:4])], pictures)
        table = sweep(b.host, texts, arms, metrics, SEEDS, 36, watch=seen, **DRAW)
        table.to_parquet(b.out / f"text-{source}.parquet")
        if source == PAIRS[0][0]:
            write_png(
                before_after(pictures, "swap", f"{source} to {target}: {n} features of the text encoder"),
                b.out / "text.png",
            )
            write_png(dose_plot(table, ["target", "source", "background"], f"{source} to {target}"), b.out / "dose.png")
        out[f"{source} to {target}"] = report(table, best, "target") | baselines(b, pair, texts, source, target)
    return out


def _same_shape(file):
    shape = {s: probed(file, "shape", s) for s in SHAPES}
    return lambda before, steered, p: sum(f(before, p) * f(steered, p) for f in shape.values())


def report(table, strength, metric):
    """Means with intervals, the dose response and the comparison with random features at one strength."""
    at = table[(table.strength == strength) & (table.control < 0)]
    pool = table[(table.strength == strength) & (table.control >= 0)]
    v = verdicts(table, metric)
    row = v[v.strength == strength].iloc[0]
    out = {"means": {}, "control means": pool.groupby("metric").value.mean().to_dict(), "rho": float(row.rho)}
    for m, own in at.groupby("metric"):
        i = interval(own.value.to_numpy(), own.prompt.to_numpy())
        out["means"][m] = [i.mean, i.low, i.high]
    curve = table[(table.metric == metric) & (table.control < 0)].groupby("strength").value.mean()
    highest = pool[pool.metric == metric].groupby("control").value.mean().max()
    size = float(row["size"])  # infinite where all controls score the same
    out |= {"size": size if np.isfinite(size) else None, "win rate": float(row.win_rate), "beaten": float(row.beaten)}
    out |= {"dose": {f"{s:g}": float(x) for s, x in curve.items()}, "highest control": float(highest)}
    return out | {"controls": int(row.controls), "|dx|/|x|": float(at.relative.mean()), "share": float(at.share.mean())}


def baselines(b, pair, texts, source, target):
    """Reconstruction alone, the mean difference of states without an SAE, and the prompt with the other word."""
    x = [b.text.decode(c, "text").mean(0) for c in pair]
    both = texts * len(SEEDS)
    nothing, _ = b.draw(both, {b.text_site: (b.text, Intervention(Edit(), unit="raw", writeback="splice"))})

    def pushed(rows, where):
        cond = where.branch == 1 if where.branch is not None else torch.ones(len(rows), dtype=torch.bool)
        return torch.where((cond & ~where.special)[:, None], rows + 2 * (x[1] - x[0]), rows)

    with b.host.edit(b.text_site, pushed, where=True):
        vector, _ = b.draw(both)
    ceiling, _ = b.draw([t.replace(source, target) for t in both])
    found = {"reconstruction only": nothing, "mean difference x2": vector, "target prompt": ceiling}
    return {"baselines": {k: rates(v, both, source, target) for k, v in found.items()}}


def attributes(b):
    """What single features of the text encoder draw where the prompt names no colour, found without a person."""
    texts = [t.replace(" red", "") for t in prompts("red", 16, 31 + 1000 * b.seed)]
    found, held = texts[:8], texts[8:]
    start = TUNING + 10_000 * b.seed
    base = {k: b.draw(v, seed=start)[0] for k, v in (("found", found), ("held", held))}

    def pair(i, which, v, sae=b.text):
        push = Intervention(Edit.add(i, 1.0), unit="rel_norm", strength=PUSH)
        return SteeredPairs(base[which], b.draw(v, {b.text_site: (sae, push)}, start)[0], v)

    live = b.text_stats.live(0.002).tolist()
    codes, tokens = text_codes(b.host, b.text, b.text_site, b.captions)
    named = {}  # the feature that tells a colour's tokens best, by difference of means
    words = np.array([[c in t for c in COLOURS] for t in b.captions])
    means = codes.pool(tokens.item["text"])
    for j, c in enumerate(COLOURS):
        on = torch.from_numpy(words[:, j])
        named[c] = int((means[on].mean(0) - means[~on].mean(0)).argmax())
    draw = np.random.default_rng(b.seed).permutation([i for i in live if i not in named.values()])[:20]
    random = [pair(int(i), "found", found) for i in draw]
    vocabulary = [f"a {w} shape" for w in (*COLOURS, *SIZES)] + [f"a {s}" for s in SHAPES]
    vocabulary += [f"a shape on a {g} background" for g in BACKGROUNDS]
    out = {}
    table = torch.stack([gains(b.judge, r, vocabulary) for r in random])
    for c, i in named.items():
        own = pair(i, "found", found)
        words_found = discover(b.judge, own, random, vocabulary)
        checked = confirm(words_found, pair(i, "held", held), clip_choice(b.judge))
        z = [v.tolist() for v in score_words(gains(b.judge, own, vocabulary), table)]
        ranked = sorted(zip(vocabulary, *z, strict=True), key=lambda w: -w[1])[:3]
        out[c] = {
            "feature": i, "found": [[a.word, a.z_words, a.z_random, a.choice.mean, a.confirmed] for a in checked],
            "highest": ranked, "pixels before": colour(c)(own.before, found).mean(),
            "pixels after": colour(c)(own.after, found).mean(),
        }  # fmt: skip
    directions, by_chance = random_control(b.text, b.seed), []
    for i in range(DIRECTIONS):  # what is found of them is found by chance
        words_found = discover(b.judge, pair(i, "found", found, directions), random, vocabulary)
        checked = confirm(words_found, pair(i, "held", held, directions), clip_choice(b.judge)) if words_found else []
        by_chance += [[i, a.word, a.z_words, a.z_random, a.choice.mean, a.confirmed] for a in checked]
    return out | {"directions": {"asked": DIRECTIONS, "found": by_chance}}


def block(b):
    """A colour painted into the left half by one block's update."""
    out = {}
    for c in ("yellow", "green", "red"):
        target, others = b.concepts.split(c)
        i = int(selection_score(target, others).mean(0).argmax())
        other = {"yellow": "blue", "green": "purple", "red": "cyan"}[c]
        texts = prompts(other, 8, 41)
        tuned = {}
        for beta in (2.0, 5.0, 10.0, 20.0):
            pictures, _ = b.draw(texts, {b.block_site: (b.block, paint(i, b.block_stats, LEFT, beta))})
            tuned[beta] = amount(pictures[..., :16], c) - amount(pictures[..., 16:], c)
        best = max(tuned, key=lambda k: tuned[k].mean())
        new = prompts(other, 8, 42, texts)
        arms = doses(
            "paint",
            [1.0, 2.0, 5.0, 10.0, 20.0],
            lambda s, i=i: {b.block_site: (b.block, paint(i, b.block_stats, LEFT, s))},
        )
        arms += controls([a for a in arms if a.strength == best], 20)
        metrics = {
            "inside": inside(LEFT), "colour left": lambda x, y, p, c=c: amount(y[..., :16], c),
            "colour right": lambda x, y, p, c=c: amount(y[..., 16:], c),
        }  # fmt: skip
        pictures = {}
        table = sweep(
            b.host, new, arms, metrics, SEEDS, 36,
            watch=collect([Item(p, noise(SEEDS[0], i)) for i, p in enumerate(new[:3])], pictures), **DRAW,
        )  # fmt: skip
        table.to_parquet(b.out / f"block-{c}.parquet")
        write_png(
            before_after(pictures, "paint", f"{c} painted left: feature {i} of one block"), b.out / f"block-{c}.png"
        )
        base = table[(table.strength == 0)].groupby("metric").value.mean().to_dict()
        out[c] = {"feature": i, "beta": best, "prompts": other, "unsteered": base} | report(table, best, "colour left")
    return out


def amount(pictures, name):
    """``(B,)`` share of pixels whose chroma is strong and nearest to a colour of the palette."""
    from mmsae.world.generator.render import PALETTE

    x = pictures.permute(0, 2, 3, 1) * 255
    chroma = x - x.mean(-1, keepdim=True)
    palette = torch.from_numpy(PALETTE - PALETTE.mean(1, keepdims=True)).float()
    nearest = (chroma @ torch.nn.functional.normalize(palette, dim=1).T).argmax(-1)
    return ((chroma.norm(dim=-1) > 30) & (nearest == COLOURS.index(name))).double().mean((1, 2))


PARTS = {"text": text_encoder, "attributes": attributes, "block": block, "unlearn": unlearn,
         "replace": detect_and_replace, "vs2": clip_vs2}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    parser.add_argument("--diffusion", help="pipeline folder; default: the cached tiny one")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of the SAE and what is drawn for attribute discovery")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*may break")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    b = Bench(args.out, args.diffusion, args.seed)
    for name in args.parts:
        file, start = args.out / f"{name}.json", time.process_time()
        if not file.exists():
            found = PARTS[name](b) | {"seconds": time.process_time() - start, "saes": b.saes}
            with atomic_file(file) as temp:
                temp.write_text(json.dumps(found, indent=1, default=float))
        print(f"{name}: {file.read_text()}")
    print(f"{time.process_time() - b.t0:.0f} CPU-seconds")


if __name__ == "__main__":
    main()

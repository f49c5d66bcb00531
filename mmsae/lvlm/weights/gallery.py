"""The page of ``mmsae weights``: the strongest image and text tokens of latents on a vision-language model.

The pass over the shards keeps the strongest tokens of every latent by uid, position and tar; the page reads the few
samples that it shows again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup, escape
from torch import Tensor

from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.lvlm.weights.file import CrossModalFile, load_weights
from mmsae.lvlm.weights.token_view import LatentOnText, TokenViewer, crop_image, heat_image
from mmsae.metrics.concepts.evidence import TopTable, unpack_uids
from mmsae.metrics.pairs.modality import CLASSES
from mmsae.report.gallery import thumbnail
from mmsae.report.page import Fact, Section, render_report
from mmsae.sae import SAE
from mmsae.shards import FaultLog, Sample, read_shard, with_image
from mmsae.types import IMAGE, TEXT, InputError, Site

PAGE = "gallery.html"
FIRST = "Asked for"
SHOWN = 4  # tokens of each modality on a card
KINDS = {
    "Shared, highest weight": "Latents whose strongest image and text tokens have the most similar states.",
    "Shared, lowest weight": "They fire on both, but their strongest tokens of either side have little in common.",
    "Image only": "Hardly ever active on text (modality index above .9), the most frequent first.",
    "Text only": "Hardly ever active on image tokens (modality index below -.9), the most frequent first.",
}


class Token(NamedTuple):
    """One of a latent's strongest tokens: where it is, and how strongly the latent fires there."""

    latent: int
    modality: str
    uid: str
    position: int
    tar: int
    value: float


class TokenSource(NamedTuple):
    """How samples of a job are looked at again."""

    host: LVLMHost  #: The host.
    sae: SAE  #: An SAE on its tokens.
    sites: dict[str, Site]  #: Sites of both segments.
    collate: Any  #: What made the sequences.
    paths: Sequence[str]  #: The tars, by number.
    batch_size: int  #: Samples per forward pass.


def choose(file: CrossModalFile, top: Mapping[str, TopTable], most: int = 8) -> dict[str, list[int]]:
    """``{heading: latents}`` that the page shows."""
    t, w = file.tensors, file.weights
    has = {m: (top[m].values[:, 0] != 0).cpu() for m in (IMAGE, TEXT)}
    fired = (t[f"fired.{IMAGE}"] + t[f"fired.{TEXT}"]).double()

    def first(score: Tensor, on: Tensor) -> list[int]:
        order = torch.where(on, score, -torch.inf).argsort(descending=True, stable=True)[:most]
        return order[on[order]].tolist()

    shared = w.isfinite() & has[IMAGE] & has[TEXT]
    best = first(w.nan_to_num(0), shared)
    worst = [j for j in first(-w.nan_to_num(0), shared) if j not in best]
    only = [first(fired, (t["class"] == CLASSES.index(m)) & has[m]) for m in (IMAGE, TEXT)]
    return dict(zip(KINDS, [best, worst, *only], strict=True))


def tokens_of(top: Mapping[str, TopTable], latents: Sequence[int], most: int = SHOWN) -> list[Token]:
    """The strongest tokens of some latents, both modalities, best first."""
    out = []
    for j in latents:
        for m, table in top.items():
            on = table.values[j, :most] != 0
            uids = unpack_uids(table.ids[j, :most][on])
            extra, values = table.extra[j, :most][on].tolist(), table.values[j, :most][on].tolist()
            places = zip(uids, extra, values, strict=True)
            out += [Token(j, m, u, position, tar, v) for u, (position, tar), v in places]
    return out


def read_samples(path: str, uids: set[str]) -> list[Sample]:
    """Some samples of a tar with their images."""
    found = (s for s in read_shard(path, FaultLog(), need=("image",), decode=False) if s.uid in uids)
    return [s for s in (with_image(sample, FaultLog()) for sample in found) if s is not None]


def draw_tokens(source: TokenSource, tokens: Sequence[Token]) -> dict[Token, Markup]:
    """Every token as HTML, from one more forward pass over the samples that have them."""
    wanted, out = defaultdict(list), {}
    for t in tokens:
        wanted[t.tar].append(t)
    for tar, own in sorted(wanted.items()):
        samples = read_samples(source.paths[tar], {t.uid for t in own})
        for i in range(0, len(samples), source.batch_size):
            part = samples[i : i + source.batch_size]
            view = TokenViewer(source.host, source.sae, source.sites, source.collate, part)
            at = {s.uid: n for n, s in enumerate(part)}
            for t in own:
                if t.uid in at:
                    out[t] = _drawn(view, at[t.uid], t)
    return {t: out[t] for t in tokens if t in out}  # best first


def _drawn(view: TokenViewer, item: int, t: Token) -> Markup:
    if t.modality == TEXT:
        return _sentence(view.text(item, t.position, t.latent), t.value)
    seen = view.image(item, t.position, t.latent)
    rows, cols = seen.heat.shape
    what = f"{t.value:.2f} at {t.position} in {view.samples[item].key}; grid {rows} x {cols}"
    shown = (thumbnail(heat_image(seen), f"heat: {what}", size=144), thumbnail(crop_image(seen), f"crop: {what}"))
    tags = Markup("").join(Markup('<img src="{}" alt="{}" title="{}">').format(p.uri, p.alt, p.alt) for p in shown)
    return Markup("<figure>{}<figcaption>{:.2f}</figcaption></figure>").format(tags, t.value)


def _sentence(seen: LatentOnText, value: float) -> Markup:
    top = max([*seen.values, 1e-12])
    words = [
        Markup('<span{} style="--heat:{:.0f}%" title="{:.3g}">{}</span>').format(
            Markup(" class=peak") if i == seen.at else "", 60 * v / top, v, word
        )
        for i, (word, v) in enumerate(zip(seen.words, seen.values, strict=True))
    ]
    return Markup("<li><q>{}</q><b>{:.2f}</b></li>").format(Markup("").join(words), value)


def card(file: CrossModalFile, latent: int, drawn: dict[Token, Markup], name: str = "") -> Markup:
    """One latent, with its name where it has one."""
    t, info = file.tensors, file.info
    facts = [CLASSES[int(t["class"][latent])]]
    known = {"weight": file.weights, "modality index": t["index.firing"], "lift": t["lift"]}
    facts += [f"{name} {values[latent]:.2f}" for name, values in known.items() if not values[latent].isnan()]
    for m in (IMAGE, TEXT):
        facts.append(f"{t[f'fired.{m}'][latent] / max(1, info['tokens'][m]):.1%} of {m} tokens")
    sides = {m: Markup("").join(html for k, html in drawn.items() if k[:2] == (latent, m)) for m in (IMAGE, TEXT)}
    body = Markup('<div class="heat">{}</div>').format(sides[IMAGE]) if sides[IMAGE] else Markup("")
    body += Markup('<ol class="tokens">{}</ol>').format(sides[TEXT]) if sides[TEXT] else Markup("")
    head = Markup('<h4>{} <small>#{}</small></h4><p class="small">{}</p>').format(
        name or "latent", latent, " · ".join(facts)
    )
    return Markup('<article class="card">{}{}</article>').format(head, body)


def write_gallery(
    folder: Path,
    top: Mapping[str, TopTable],
    source: TokenSource,
    latents: Sequence[int] = (),
    names: Mapping[int, str] | None = None,
) -> Path:
    """Write ``gallery.html`` into a folder of weights, with some ``latents`` first, called by their ``names``.

    The ``extra`` of the strongest tokens holds each token's position and the number of its tar.

    Raises:
        InputError: A latent that the SAE does not have.
    """
    d_sae, file = source.sae.d_sae, load_weights(folder)
    for j in latents:
        if not 0 <= j < d_sae:
            raise InputError(f"there is no latent {j} in an SAE of {d_sae} latents")
    shown, info = choose(file, top), file.info
    if latents:
        shown = {FIRST: list(dict.fromkeys(latents)), **shown}
    drawn = draw_tokens(source, tokens_of(top, list(dict.fromkeys(j for ids in shown.values() for j in ids))))
    text = (
        "Images: the latent's activation on the grid of the host's processor, grey where it is silent, red where it"
        " is strong (1st to 99th percentile of the image), and what is around its strongest token. Sentences: the"
        " strongest token is underlined, the darker a word the stronger. One token a sample."
    )
    facts = [
        Fact("latents with a weight", info["weighted"], f"{info['coverage']:.0%} of those that fire"),
        Fact("mean weight", info["mean_weight"]),
        *(Fact(f"{name} latents", info["classes"][name]) for name in CLASSES),
        Fact("shared with lift above 2", info["shared_lifted"], "share of all latents"),
        Fact("pairs looked at", info["pairs"]),
    ]
    sections = [Section("Latents", text, facts=facts)]
    for heading, ids in shown.items():
        if ids:
            cards = Markup("").join(card(file, j, drawn, (names or {}).get(j, "")) for j in ids)
            intro = Markup('<p>{}</p><div class="cards">{}</div>').format(escape(KINDS.get(heading, "")), cards)
            sections.append(Section(heading, intro))
    meta = {"site": str(next(iter(source.sites.values())).module), "text": info["text"], "delta": info["delta"]}
    lead = "Which image and text tokens of a vision-language model make a latent fire."
    return render_report(folder / PAGE, "Tokens of latents", sections, lead=lead, meta=meta)

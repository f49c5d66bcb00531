"""Scores of an alignment set by every method: SAE-V on a vision-language host, pair scores on a CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmsae.bench.filter.world import Alignment
from mmsae.hosts import load_host
from mmsae.load import load_pair
from mmsae.lvlm.options import Definition, TokenSample
from mmsae.lvlm.tokens import TokenScorer
from mmsae.lvlm.weights.file import load_weights
from mmsae.lvlm.weights.job import cross_modal_weights
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.metrics.reconstruction import fvu
from mmsae.options import SAERun
from mmsae.sae import SAE, AuxK, CodeCosine, Dictionary, Normaliser, Reconstruction, TopK
from mmsae.training.plain import train
from mmsae.types import IMAGE, TEXT, ImageTextBatch
from mmsae.world.generator.data import generate
from mmsae.world.measure.host import embed_images, embed_texts
from mmsae.world.models.llava.questions import pil_images

READS = ("question+answer", "question")
SITE = "layers.1:out"
DELTA_QUANTILE = 0.5  # a latent counts where it is above the median activation: spec of SAE-V, section 9, trap 4


def train_sae(
    sae: SAE, x: dict[str, Tensor], losses: Sequence[Any], steps: int, seed: int, lr: float = 2e-3, rows: int = 512
) -> SAE:
    """Train in place on activations in memory: pairs where both modalities have equally many rows, tokens otherwise."""
    rng, paired = torch.Generator().manual_seed(seed), len({len(v) for v in x.values()}) == 1
    sae.fit_normaliser(x)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            if paired:
                draw = torch.randint(len(next(iter(x.values()))), (rows,), generator=rng)
                yield {m: v[draw] for m, v in x.items()}
            else:
                yield {m: v[torch.randint(len(v), (rows,), generator=rng)] for m, v in x.items()}

    train(sae, losses, batches(), steps, lr, seed)
    return sae


def _sae(d_in: int, d_sae: int, k: int, shared: bool, seed: int) -> SAE:
    """TopK on centred unit rows, as the generated world's recipes have it."""
    torch.manual_seed(seed)
    keys = ("shared",) if shared else (IMAGE, TEXT)
    normaliser = Normaliser(unit_in=True, centre=True, unit_out=True)
    return SAE(d_in, d_sae, selector=TopK(k), normaliser=normaliser, dictionaries={m: Dictionary() for m in keys})


def conversations(host: Any, data: Alignment, text: str, size: int = 100) -> Iterator[ImageTextBatch]:
    """Batches of a vision-language host, of the questions alone or with their answers (:data:`READS`)."""
    collate = host.collator(text)
    answers = data.answers if text == READS[0] else [None] * len(data.answers)
    for i in range(0, len(data.uids), size):
        part = slice(i, i + size)
        yield collate.batch(data.questions[part], pil_images(data.images[part]), answers[part], data.uids[part])


def train_token_sae(base: str, data: Alignment, out: Path, steps: int, d_sae: int, k: int, seed: int) -> dict[str, Any]:
    """An SAE on the image and text tokens of the base model, of the set as it is: nobody says which are damaged."""
    host = load_host(f"lvlm:{base}")
    sites = host.sites(SITE)
    parts = [host.capture(batch, sites).x for batch in conversations(host, data, READS[0])]
    x = {m: torch.cat([p[m] for p in parts]) for m in (IMAGE, TEXT)}
    sae = _sae(host.hidden_size, d_sae, k, True, seed)
    sae.sites = sites
    train_sae(sae, x, [Reconstruction(), AuxK(dead_after=50_000)], steps, seed)
    sae.save_pretrained(out)
    with torch.no_grad():
        error = {m: fvu(sae.decode(sae.encode(v[:20_000], m), m), v[:20_000]) for m, v in x.items()}
    return {"fvu": error, "rows": {m: len(v) for m, v in x.items()}, "d_sae": d_sae, "k": k, "site": SITE}


def token_scores(base: str, sae: Path, shards: Path, data: Alignment, text: str, out: Path) -> dict[str, np.ndarray]:
    """``{score: (n,)}`` of SAE-V, and ``n_text``; the cross-modal weights come to ``out``."""
    model, host = load_pair(sae, f"lvlm:{base}", device="cpu")
    definition, run = Definition(delta_quantile=DELTA_QUANTILE), SAERun(batch_size=50, workers=0, progress=False)
    cross_modal_weights(host, model, str(shards), out, definition, TokenSample(text), run)
    file = load_weights(out)
    scorer = TokenScorer(host, model, file.weights, file.delta)
    parts = [scorer.score(batch) for batch in conversations(host, data, text)]
    return {name: torch.cat([p[name] for p in parts]).numpy() for name in scorer.columns if name != "n_image"}


def pair_scores(
    clip: str, data: Alignment, pairs: int, seed: int, out: Path, steps: int, d_sae: int = 128, k: int = 8
) -> dict[str, np.ndarray]:
    """``{score: (n,)}`` of a PairedTopK on a CLIP, both trained on clean pairs of the world, and of the CLIP alone."""
    host = load_host(f"local-dir:{clip}")
    train = generate(pairs, seed)
    x = {IMAGE: embed_images(host, train.images), TEXT: embed_texts(host, train.full)}
    sae = _sae(x[IMAGE].shape[1], d_sae, k, False, seed)
    sae.sites = host.default_sites()
    train_sae(sae, x, [Reconstruction(), AuxK(k_aux=16, dead_after=25_600), CodeCosine(0.1)], steps, seed, lr=5e-3)
    sae.save_pretrained(out)
    own = {IMAGE: embed_images(host, data.images), TEXT: embed_texts(host, data.texts())}
    with torch.no_grad():
        z, fitted = ({m: sae.encode(v, m) for m, v in e.items()} for e in (own, x))
        scorer = PairScorer.fit(fitted[IMAGE], fitted[TEXT], x[IMAGE], x[TEXT])
        found = scorer.codes(z[IMAGE], z[TEXT]) | scorer.embeddings(own[IMAGE], own[TEXT])
    return {name: v.double().numpy() for name, v in found.items()}

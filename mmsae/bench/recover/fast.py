"""FAST (arXiv 2506.07691): SAEs that learn from tokens of whole conversations, and ones that learn from packed blocks.

Both learn from the same conversations with the tiny LLaVA of the generated world, and so from equally many tokens, all
that there are. *Whole*: every conversation is a sequence of its own. *Packed*: conversations follow each other in
blocks of the host's context and see all before them. Held-out conversations are read in both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mmsae.activations import MixingBuffer
from mmsae.bench.llava import base_model
from mmsae.bench.recover.models import LR
from mmsae.bench.sized import Size, sae_recipes, sized
from mmsae.bench.summary import over_seeds
from mmsae.hosts import load_host
from mmsae.jobs.stages import Stages
from mmsae.metrics.reconstruction import FlaggedError, fvu
from mmsae.sae import SAE
from mmsae.training.plain import train
from mmsae.types import TEXT, Tokens

if TYPE_CHECKING:
    from mmsae.bench.filter.world import Alignment

NAME = "conversations"
ABOUT = "all tokens of the generated world's tiny LLaVA, which are of one modality"
VARIANTS = ("topk", "jumprelu")
WAYS = ("whole", "packed")
SITE = "layers.1:out[all]"
SEEDS = {"train": 5, "held": 6}  #: Of the conversations.
NORMALISER = {"centre": True, "scale": "rms"}  #: Of every SAE.
COLUMNS = {
    "mse_special": "MSE, special tokens",
    "mse_other": "other tokens",
    "fvu": "FVU",
    "l0": "L0",
    "dead": "dead",
    "packed_special": "read packed: MSE, special tokens",
    "packed_other": "other tokens ",
}
DEVIATIONS = ("mse_special", "mse_other", "packed_special", "packed_other")


class FastSizes(NamedTuple):
    """How much of everything."""

    scenes: int = 6000  #: Scenes that CLIP and LLaVA learn from.
    clip_steps: int = 300  #: Steps of the CLIP.
    base_steps: int = 300  #: Steps of the LLaVA.
    train: int = 6000  #: Conversations that SAEs learn from.
    held: int = 600  #: Conversations that are scored.
    d_sae: int = 512  #: Latents.
    k: int = 12  #: Latents of a token.
    rows: int = 256  #: Tokens a step.
    buffer: int = 16_384  #: Tokens that are mixed.


def seen(worlds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bool:
    """Whether whole conversations leave less error on special tokens than packed blocks do: for every SAE at least a
    twentieth less, with at most a tenth more latents a token.
    """
    table = worlds[NAME]

    def better(variant: str) -> bool:
        whole, packed = (table[f"{variant} ({way})"] for way in WAYS)
        return whole["mse_special"] <= 0.95 * packed["mse_special"] and whole["l0"] <= 1.1 * packed["l0"]

    return all(better(variant) for variant in VARIANTS)


def fast_rows(
    stages: Stages,
    names: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    sizes: FastSizes = FastSizes(),
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Figures of the SAEs among ``names`` that learned from each form of the conversations, means over seeds."""
    out: dict[str, dict[str, float]] = {}
    variants = [v for v in VARIANTS if v in names]
    if not variants:
        return out
    _, base = base_model(stages, sizes.scenes, sizes.clip_steps, sizes.base_steps, progress=progress)
    for variant in variants:
        for way in WAYS:

            def once(seed: int, variant: str = variant, way: str = way) -> dict[str, float]:
                train_tokens, held = (conversation_tokens(base, split, sizes) for split in SEEDS)
                sae = fitted(sae_recipes()[variant], train_tokens[way], sizes, steps, seed)
                return token_figures(sae, held)

            name = f"{variant} ({way})"
            out[name] = over_seeds([stages.run(f"runs/{NAME}-{name}-{s}", lambda s=s: once(s)) for s in seeds])
            if progress:
                print(f"{NAME}, {name}: " + ", ".join(f"{k} {out[name][k]:.4f}" for k in COLUMNS), flush=True)
    return out


@lru_cache(maxsize=2)  # all SAEs learn from the same tokens
def conversation_tokens(base: str, split: str, sizes: FastSizes) -> dict[str, list[Tokens]]:
    """``{way: batches}`` of the tokens of a split's conversations with a LLaVA."""
    from mmsae.bench.filter.scores import READS, conversations
    from mmsae.bench.filter.world import alignment_set

    host = load_host(f"lvlm:{base}")
    data: Alignment = alignment_set(getattr(sizes, split), SEEDS[split], 0.0)
    sites = {TEXT: SITE}
    packer = host.packer(host.collator(READS[0]), separate=False)
    out: dict[str, list[Tokens]] = {way: [] for way in WAYS}
    for batch in conversations(host, data, READS[0]):
        out["whole"].append(host.capture(batch, sites))
        out["packed"].append(host.capture(packer.pack(batch), sites))
    return out


def fitted(recipe: Path, batches: Sequence[Tokens], sizes: FastSizes, steps: int, seed: int) -> SAE:
    """An SAE of a recipe that learned from a stream of these batches, mixed as FAST mixes them."""
    torch.manual_seed(seed)
    x = torch.cat([t.x[TEXT] for t in batches])
    size = Size(x.shape[1], sizes.d_sae, sizes.k, (TEXT,), steps, sizes.rows)
    sae, losses = sized(recipe, size, normaliser=NORMALISER)
    sae.fit_normaliser({TEXT: x})
    buffer = MixingBuffer(sizes.buffer, sizes.rows, seed, half=True)
    train(sae, losses, buffer.mix(_stream(batches, seed)), steps, LR, seed)
    return sae.eval()


def _stream(batches: Sequence[Tokens], seed: int) -> Iterator[Tokens]:
    """All batches in an order of chance, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


@torch.no_grad()
def token_figures(sae: SAE, held: Mapping[str, Sequence[Tokens]]) -> dict[str, float]:
    """Errors on special tokens and on the others in raw units, of both ways of reading; the rest is of whole ones.

    Special tokens are those that ``val/mse/special`` of ``mmsae fit`` counts: BOS, EOS and the template's.
    """
    out: dict[str, float] = {}
    for way, batches in held.items():
        special, other, parts = FlaggedError(), FlaggedError(), []
        on = torch.zeros(sae.d_sae, dtype=torch.bool)
        count = 0
        for tokens in batches:
            x, flag = tokens.x[TEXT], tokens.special[TEXT]
            z = sae.encode(x, TEXT)
            x_hat = sae.decode(z, TEXT)
            special.update(x_hat, x, special=flag)
            other.update(x_hat, x, special=~flag)
            fired = z.to_dense() != 0
            on, count = on | fired.any(0), count + int(fired.sum())
            parts.append((x_hat, x))
        prefix = "mse" if way == "whole" else way
        out |= {f"{prefix}_{n}": float(m.compute()["mse/special"]) for n, m in (("special", special), ("other", other))}
        if way == "whole":
            x_hat, x = (torch.cat(p) for p in zip(*parts, strict=True))
            out |= {"fvu": fvu(x_hat, x), "l0": count / len(x), "dead": float((~on).double().mean())}
    return out


def fast_table(rows: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""

    def cell(row: Mapping[str, float], name: str) -> str:
        digits = 1 if name == "l0" else 3 if name in ("fvu", "dead") else 4
        sd = row.get(f"{name}_sd") if name in DEVIATIONS else None
        return f"{row[name]:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")

    head = ["SAE", *(c.strip() for c in COLUMNS.values())]
    return head, [[name, *(cell(row, c) for c in COLUMNS)] for name, row in rows.items()]

"""How much of a vision-language model's language modelling survives an SAE's reconstruction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.lvlm.host import LVLMHost, recovered
from mmsae.hosts.lvlm.tokens import ANSWER, select
from mmsae.hosts.sites import Where
from mmsae.lvlm.tokens import segment_sites
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, ImageTextBatch


class Recovered(NamedTuple):
    """Mean cross-entropies in nats per predicted token."""

    original: float  #: Loss of the model as it is.
    reconstructed: float  #: Loss with the SAE's reconstruction in place of the states.
    zeroed: float  #: Loss with zeros in place of all states.
    recovered: float  #: ``(zeroed - reconstructed) / (zeroed - original)``; 1 is perfect, 0 as bad as zeros.
    tokens: int  #: Number of predicted tokens.


@torch.no_grad()
def ce_recovered(
    host: LVLMHost,
    sae: SAE,
    batches: Iterable[ImageTextBatch],
    targets: str = "text",
    special: bool = False,
    allow_other_site: bool = False,
) -> Recovered:
    """Cross-entropy with original, reconstructed and zeroed states at the SAE's module.

    Run it twice for the two figures of SAE-V: on prompts with their images, and on prompts without.

    Args:
        host: The host.
        sae: An SAE on its tokens.
        batches: What the host's collate makes; ``collator("question+answer")`` has answers to predict.
        targets: Predicted tokens: ``text`` (question and answer), ``text_all``, or ``answer``: a model that was trained
            on answers alone predicts questions so badly that any damage helps.
        special: Whether BOS and template tokens are reconstructed too; SAEs here are not trained on them.
        allow_other_site: Accept an SAE of another host.
    """
    sites = segment_sites(sae, host, allow_other_site)
    first = next(iter(sites.values()))
    site = f"{first.module}:{first.io}[all]"
    only = sae.modalities[0]

    def reconstruct(rows: Tensor, where: Where) -> Tensor:
        out = rows.clone()
        content = torch.ones_like(where.image) if special else ~where.special
        for m, own in ((IMAGE, where.image & content), (TEXT, ~where.image & content)):
            name = m if m in sae.modalities else only
            out[own] = sae.decode(sae.encode(rows[own], name), name).to(out)
        return out

    def loss(batch: ImageTextBatch) -> Tensor:
        policy = "text" if targets == "answer" else targets
        found = host.loss(batch, targets=policy)
        if targets != "answer":
            return found.ce.double()
        position = batch.inputs["attention_mask"].long().cumsum(1) - 1
        kinds = batch.inputs["kinds"][:, 1:][(select(policy, batch.inputs["kinds"]) & (position > 0))[:, 1:]]
        return found.ce[(kinds == ANSWER).to(found.ce.device)].double()

    sums, tokens = [0.0, 0.0, 0.0], 0
    for batch in batches:
        ce = loss(batch)
        sums[0] += ce.sum().item()
        tokens += len(ce)
        for i, fn in ((1, reconstruct), (2, lambda rows, where: torch.zeros_like(rows))):
            with host.edit(site, fn, where=True):
                sums[i] += loss(batch).sum().item()
    original, made, zeroed = (s / max(tokens, 1) for s in sums)
    return Recovered(original, made, zeroed, recovered(original, made, zeroed), tokens)

"""Steering a diffusion model through its text encoder: single features, and words for words.

A text edit changes keys and values of every cross-attention layer at every step. Sites are layers that the pipeline
consumes (``text_encoder.layers.9:out``); hosts refuse later ones. Branches are tagged by the host while it encodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.sae import SAE
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.types import Codes, ImageTextBatch, InputError, Tokens


def text_codes(
    host: Any, sae: SAE, site: Any, prompts: Sequence[str], modality: str | None = None
) -> tuple[Codes, Tokens]:
    """Codes of a text site for some prompts, and the tokens that they are of."""
    tokens = host.capture(text_batch(host, prompts), [site])
    [(_, x)] = tokens.x.items()
    return sae.encode(x, modality), tokens


def text_batch(host: Any, prompts: Sequence[str]) -> ImageTextBatch:
    """A batch of texts alone."""
    names = [str(i) for i in range(len(prompts))]
    return ImageTextBatch(None, host.tokenize(list(prompts)), names, list(prompts), names, [""] * len(prompts))


class WordPair(NamedTuple):
    """Codes of prompts that differ in one word, content tokens only; row i of both is the same place of one prompt."""

    source: Codes  #: Codes of the word that is there.
    target: Codes  #: Codes of the word that should be.

    @property
    def delta(self) -> Tensor:
        """``(F,)`` mean change of the codes from source to target."""
        means = [c.pool(torch.zeros(c.n, dtype=torch.long, device=c.values.device), 1)[0] for c in self]
        return means[1] - means[0]

    def top(self, n: int) -> tuple[Tensor, Tensor]:
        """Up to ``n // 2`` features that go away with the source word, and as many that come; most change first."""
        delta = self.delta
        order = delta.argsort(stable=True)
        going, coming = order[: n // 2], order.flip(0)[: n // 2]
        return going[delta[going] < 0], coming[delta[coming] > 0]


def word_pair(host: Any, sae: SAE, site: Any, source: Sequence[str], target: Sequence[str]) -> WordPair:
    """Contrast of ``source`` prompts with a word, and the same prompts with the word that should be there.

    Raises:
        InputError: Different numbers of prompts, or of tokens.
    """
    if len(source) != len(target) or not source:
        raise InputError(f"word pairs need as many prompts of both words, not {len(source)} and {len(target)}.")
    found = []
    for prompts in (source, target):
        codes, tokens = text_codes(host, sae, site, prompts)
        [special] = (tokens.special or {"": torch.zeros(codes.n, dtype=torch.bool)}).values()
        found.append(codes.rows(~special.to(codes.values.device)))
    if found[0].n != found[1].n:
        raise InputError(f"the two words take other numbers of tokens: {found[0].n} and {found[1].n} in all prompts.")
    return WordPair(*found)


def substitute(pair: WordPair, n: int = 16, strength: float = 1.0, **gates: Any) -> Intervention:
    """Exchange one word for another in the codes of a prompt.

    On tokens where a feature of the source word fires, the mean difference of such tokens is added, in the ``n``
    features that change most, half of them going and half of them coming. Strength 1 is what the other word does in the
    mean. The pair is to be made of other prompts than those that are reported; ``gates`` are other fields of the
    intervention.

    Raises:
        InputError: Nothing of the source's goes away.
    """
    if any((c.values < 0).any() for c in pair):
        raise InputError("words are exchanged where a feature of the source exceeds 0, which codes with signs may not")
    going, coming = pair.top(n)
    if not len(going):
        raise InputError("the source word has no feature that the target lacks: there is nothing to exchange.")
    ids = torch.cat([going, coming]).sort().values
    at = (pair.source.gather(going) > 0).any(1)
    delta = pair.target.rows(at).gather(ids).mean(0) - pair.source.rows(at).gather(ids).mean(0)
    tau = torch.where(torch.isin(ids, going), 0.0, torch.inf)  # what comes does not say where the source is
    return Intervention(
        Edit.add(ids, delta), unit="raw", strength=strength, active=tau, **{"tokens": "content", **gates}
    )  # fmt: skip

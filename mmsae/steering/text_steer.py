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
from mmsae.steering.edit import Edit
from mmsae.steering.intervention import Intervention
from mmsae.steering.units import FeatureStats
from mmsae.types import Codes, ImageTextBatch, InputError, Tokens


def text_feature(
    ids: int | Sequence[int], stats: FeatureStats, value: float = 5.0, op: str = "add", **gates: Any
) -> Intervention:
    """``add`` or ``set`` features at content tokens of the prompt, in multiples of their mean when active.

    For the pooled vector give the same to an SAE of its own site (``text_encoder_2.text_projection:out``).

    Args:
        ids: Features.
        stats: Of their codes.
        value: In the unit.
        op: ``add`` or ``set``.
        **gates: Others of the intervention: ``tokens="eos"``, ``steps``, ``unit``, ...
    """
    if op not in ("add", "set"):
        raise InputError(f"op {op!r} is not add or set.")
    return Intervention(
        getattr(Edit, op)(ids, value), **{"unit": "x_mean_active", "stats": stats, "tokens": "content", **gates}
    )


def text_codes(
    host: Any, sae: SAE, site: Any, prompts: Sequence[str], modality: str | None = None
) -> tuple[Codes, Tokens]:
    """Codes of a text site for some prompts, and the tokens that they are of.

    Args:
        host: With ``tokenize`` and ``capture``.
        sae: Trained there.
        site: Of text.
        prompts: Texts.
        modality: Of the SAE.
    """
    tokens = host.capture(text_batch(host, prompts), [site])
    [(_, x)] = tokens.x.items()
    return sae.encode(x, modality), tokens


def text_batch(host: Any, prompts: Sequence[str]) -> ImageTextBatch:
    """A batch of texts alone."""
    names = [str(i) for i in range(len(prompts))]
    return ImageTextBatch(None, host.tokenize(list(prompts)), names, list(prompts), names, [""] * len(prompts))


class WordPair(NamedTuple):
    """What changes in the codes when one word of a prompt is exchanged.

    Attributes:
        delta: ``(F,)`` mean code of the target's prompts minus the source's, over content tokens.
        source: ``(F,)`` mean code of the source's prompts.
    """

    delta: Tensor
    source: Tensor

    def top(self, n: int) -> Tensor:
        """The ``n`` features that change most, ascending ids."""
        return self.delta.abs().topk(min(n, int((self.delta != 0).sum()))).indices.sort().values


def word_pair(host: Any, sae: SAE, site: Any, source: Sequence[str], target: Sequence[str]) -> WordPair:
    """Contrast of prompts that differ in one word.

    Args:
        host: See :func:`text_codes`.
        sae: See :func:`text_codes`.
        site: See :func:`text_codes`.
        source: Prompts with the word that is there.
        target: The same prompts with the word that should be.

    Raises:
        InputError: Different numbers of prompts.
    """
    if len(source) != len(target) or not source:
        raise InputError(f"word pairs need as many prompts of both words, not {len(source)} and {len(target)}.")
    means = []
    for prompts in (source, target):
        codes, tokens = text_codes(host, sae, site, prompts)
        [special] = (tokens.special or {"": torch.zeros(codes.n, dtype=torch.bool)}).values()
        content = codes.rows(~special.to(codes.values.device))
        means.append(content.pool(torch.zeros(content.n, dtype=torch.long, device=content.values.device), 1)[0])
    return WordPair(means[1] - means[0], means[0])


def substitute(pair: WordPair, n: int = 16, strength: float = 6.0, **gates: Any) -> Intervention:
    """Exchange one word for another: on tokens where a feature of the source fires, its difference is added.

    Args:
        pair: From :func:`word_pair`, of other prompts than those that are reported.
        n: Features that change most.
        strength: Multiples of the mean difference, which is small: it is a mean over all content tokens.
        **gates: Of the intervention.

    Raises:
        InputError: Nothing of the source's goes away.
    """
    ids = pair.top(n)
    delta = pair.delta[ids]
    if not (delta < 0).any():
        raise InputError("the source word has no feature that the target lacks: there is nothing to exchange.")
    tau = torch.where(delta < 0, 0.0, torch.inf)  # only features that go away say where the source is
    return Intervention(
        Edit.add(ids, delta), unit="raw", strength=strength, active=tau, **{"tokens": "content", **gates}
    )  # fmt: skip

"""Intervention score, after Delphi (arXiv 2410.13928, its released history): does a model that is pushed along a latent
say what the name says?

The latent is added with the strength at which the mean KL of the next token, clean to steered, hits a target. The score
of a name is the mean over prompts of how much less surprising it is after the steered text than after the clean one, in
nats. Printed beside: the same of random explanations, of random directions at equal KL, and of the latent's ablation.
For a vision-language model, whose SAE is on image rows, texts are what it says of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.scores.outcomes import Scores
from mmsae.interpret.scores.subjects import misplaced

TARGET = 0.5  # nats
TELLS = "Text: {text}\n\nThis text is about "
ZERO = "zero"


class Push(NamedTuple):
    """What is done to a model."""

    latent: int  #: Whose atom is added
    strength: float  #: By how much; 0 changes nothing
    kind: str = "latent"  #: ``latent``, ``random`` (a random direction of the atom's length) or ``zero`` (ablated)


class Steerable(Protocol):
    """A model that can be pushed."""

    def kl(self, push: Push) -> float:
        """Mean KL of the next token over tuning prompts, clean to pushed, in nats."""

    def say(self, push: Push) -> list[str]:
        """What it says to the scoring prompts, in their order."""


class Gains(NamedTuple):
    """Gains in nats of L latents, one column per prompt."""

    latents: np.ndarray  #: ``(L,)``
    name: np.ndarray  #: ``(L, P)`` of the names
    shuffled: np.ndarray  #: ``(L, P)`` of names of others, on the same texts
    random: np.ndarray  #: ``(L, P)`` of the names, with a random direction at equal KL
    zero: np.ndarray  #: ``(L, P)`` of the names, with the latent ablated
    kl: np.ndarray  #: ``(L,)`` KL that was reached
    strength: np.ndarray  #: ``(L,)``

    def scores(self, seed: int = 0) -> dict[str, Scores]:
        """Mean gains with a bootstrap over prompts: of names (no key), ``shuffled``, ``random``, ``zero``; chance 0."""
        import torch

        from mmsae.metrics.statistics import bootstrap_mean

        out = {}
        for name, table in (("", self.name), ("shuffled", self.shuffled), ("random", self.random), (ZERO, self.zero)):
            ends = np.array([bootstrap_mean(torch.from_numpy(row), seed=seed) for row in table]).reshape(-1, 2)
            n = (~np.isnan(table)).sum(1)
            mean = np.where(n > 0, np.nansum(table, 1) / np.maximum(n, 1), np.nan)
            out[name] = Scores(self.latents, mean, 0.0, n, ends[:, 0], ends[:, 1])
        return out


def tuned(
    model: Steerable, latent: int, kind: str = "latent", target: float = TARGET, start: float = 1.0
) -> tuple[Push, float]:
    """The push whose KL is the target, as near as the search gets, and its KL."""
    from mmsae.steering.methods.kl_strength import search_kl

    found = search_kl(lambda s: model.kl(Push(latent, s, kind)), target, start)
    return Push(latent, found.strength, kind), found.kl


def gain(asked: Asked, names: Sequence[str], clean: Sequence[str], pushed: Sequence[str]) -> np.ndarray:
    """``(P,)`` nats by which a name is less surprising after the pushed text than after the clean one."""
    before = asked.score([(TELLS.format(text=t), n) for n, t in zip(names, clean, strict=True)])
    after = asked.score([(TELLS.format(text=t), n) for n, t in zip(names, pushed, strict=True)])
    return np.array([np.nan if None in (a, b) else sum(b) - sum(a) for a, b in zip(before, after, strict=True)], float)


def intervention(
    model: Steerable, asked: Asked, latents: Sequence[int], names: Sequence[str], target: float = TARGET, seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> Gains:  # fmt: skip
    """Gains of names, with all controls."""
    others, rows = misplaced(list(names), seed), []
    clean = model.say(Push(latents[0], 0.0)) if len(latents) else []
    p = len(clean)
    for j, name, other in zip(latents, names, others, strict=True):
        push, kl = tuned(model, j, target=target)
        said = model.say(push)
        random = model.say(tuned(model, j, "random", target)[0])
        zero = model.say(Push(j, 0.0, ZERO))
        pairs = ((name, said), (other, said), (name, random), (name, zero))
        rows.append((*(gain(asked, [n] * p, clean, t) for n, t in pairs), kl, push.strength))
        done()
    columns = [np.array(c, float) for c in zip(*rows, strict=True)] or [np.zeros((0, 0))] * 4 + [np.zeros(0)] * 2
    return Gains(np.array(latents, np.int64), *columns)


class LVLMSteerable:
    """A vision-language model that is pushed at the site of an SAE on its image rows.

    Args:
        host: The model.
        sae: The SAE.
        images: PIL images; the first ``tuning`` set the strength, what is said of the others is scored.
        question: What is asked of each.
        tuning: How many.
        max_tokens: Length of what it says.
        seed: Seed of random directions.
    """

    def __init__(
        self, host: Any, sae: Any, images: Sequence[Any], question: str = "Describe this image.", tuning: int = 10,
        max_tokens: int = 8, seed: int = 0,
    ):  # fmt: skip
        from mmsae.interpret.names.steering import image_site

        self.host, self.sae, self.seed, self.max_tokens = host, sae, seed, max_tokens
        self.site = image_site(host, sae)
        batches = [
            host.collate.batch([question] * len(part), list(part)) for part in (images[:tuning], images[tuning:])
        ]
        self.tuning, self.scoring = batches
        self.clean = self._logs()

    def _logs(self) -> Any:
        import torch

        return torch.log_softmax(self.host.forward(self.tuning).logits[:, -1].float(), -1)

    def _attached(self, push: Push) -> Any:
        from contextlib import nullcontext

        import torch

        from mmsae.steering.edits.attach import attach
        from mmsae.steering.edits.edit import Edit
        from mmsae.steering.edits.intervention import Intervention

        if push.kind == ZERO:
            return attach(self.host, {self.site: (self.sae, Intervention(Edit.ablate([push.latent]), unit="raw"))})
        if not push.strength:
            return nullcontext()
        if push.kind == "latent":
            edit = Edit.add([push.latent], push.strength)
            return attach(self.host, {self.site: (self.sae, Intervention(edit, unit="raw"))})
        atom = self.sae.dictionary(self.site.modality).rows()[push.latent].detach().float()
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + push.latent)
        u = torch.randn(atom.shape, generator=g).to(atom)
        u = u / u.norm() * atom.norm() * push.strength
        return self.host.edit(self.site, lambda x: x + u.to(x))

    def kl(self, push: Push) -> float:
        """Mean KL over the tuning images."""
        with self._attached(push):
            logs = self._logs()
        return float((self.clean.exp() * (self.clean - logs)).sum(-1).mean())

    def say(self, push: Push) -> list[str]:
        """What it says of the scoring images."""
        with self._attached(push):
            return self.host.answer(self.scoring, max_new_tokens=self.max_tokens)

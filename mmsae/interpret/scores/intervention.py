"""Intervention score, after Delphi (arXiv 2410.13928, its released history): does a model that is pushed along a latent
say what an explanation says?

The latent is added with the strength at which the mean KL of the next token, clean to steered, hits a target: of every
token of what the model says without it, since the first is often the same whatever is shown. The score of an
explanation is the mean over prompts of how much less surprising it is after the steered text than after the clean one,
in nats. Two explanations of each latent are scored: its name, and the best of those that the push itself suggests
(:mod:`mmsae.interpret.scores.proposals`). Printed beside: explanations of other latents on the same texts, random
directions at equal KL (with the name, and with the best explanation that is found for them in the same way), and the
latent's ablation. For a vision-language model, whose SAE is on image rows, texts are what it says of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.scores.outcomes import Scores
from mmsae.interpret.scores.proposals import MOST, best_of, proposals
from mmsae.interpret.scores.subjects import misplaced

TARGET = 0.5  # nats
FAR = 0.2  # of the target, by which a KL that is reached may be off
TELLS = "Text: {text}\n\nThis text is about "
ZERO, RANDOM, SHUFFLED, FOUND = "zero", "random", "shuffled", "found"
#: ``(scorer's suffix, control)`` of the tables of gains.
KINDS = (("", ""), ("", SHUFFLED), (RANDOM, ""), (ZERO, ""), (FOUND, ""), (FOUND, SHUFFLED), (f"{FOUND}_{RANDOM}", ""))


class Push(NamedTuple):
    """What is done to a model."""

    latent: int  #: Whose atom is added
    strength: float  #: By how much; 0 changes nothing
    kind: str = "latent"  #: ``latent``, ``random`` (a random direction of the atom's length) or ``zero`` (ablated)


class Steerable(Protocol):
    """A model that can be pushed."""

    def kl(self, push: Push) -> float:
        """Mean KL of the next token over tuning prompts, clean to pushed, in nats."""

    def risen(self, push: Push) -> list[str]:
        """Words whose probability of being next rises most over the tuning prompts, the most first."""

    def say(self, push: Push, tuning: bool = False) -> list[str]:
        """What it says to the scoring prompts, or to the tuning ones, in their order."""


class Gains(NamedTuple):
    """Gains in nats of L latents."""

    latents: np.ndarray  #: ``(L,)``
    tables: dict[tuple[str, str], np.ndarray]  #: ``{kind: (L, P)}``, one column per prompt, for all :data:`KINDS`
    about: list[dict[str, Any]]  #: Of each latent: KL and strength that were reached, explanation and words found
    target: float = TARGET  #: KL that was to be reached

    def missed(self) -> str:
        """A sentence about pushes that did not reach the KL, however strong they were; empty where all did."""
        kl = np.array([a["kl"] for a in self.about])
        far = np.abs(kl - self.target) > FAR * self.target
        if not far.any():
            return ""
        said = f"{far.sum()} of {len(kl)} latents do not move the host to a KL of {self.target:g}"
        return f"{said} but to {np.median(kl[far]):.3g} in the middle: what they score is of that"

    def scores(self, seed: int = 0) -> dict[tuple[str, str], Scores]:
        """Mean gains with a bootstrap over prompts, by kind; chance 0."""
        import torch

        from mmsae.metrics.statistics import bootstrap_mean

        out = {}
        for kind, table in self.tables.items():
            ends = np.array([bootstrap_mean(torch.from_numpy(row), seed=seed) for row in table]).reshape(-1, 2)
            n = (~np.isnan(table)).sum(1)
            mean = np.where(n > 0, np.nansum(table, 1) / np.maximum(n, 1), np.nan)
            out[kind] = Scores(self.latents, mean, 0.0, n, ends[:, 0], ends[:, 1])
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


def found_by(model: Steerable, asked: Asked, push: Push, clean: Sequence[str]) -> tuple[str, list[str]]:
    """The explanation that gains most on the tuning prompts of those that a push suggests, empty where none does; and
    the words that rise. ``clean`` is what the model says to them without the push.
    """
    risen, said = model.risen(push), model.say(push, tuning=True)
    texts = proposals(asked, risen, clean, said)
    gains = np.array([gain(asked, [t] * len(clean), clean, said) for t in texts]).reshape(len(texts), len(clean))
    return best_of(texts, gains) or "", risen


def intervention(
    model: Steerable, asked: Asked, latents: Sequence[int], names: Sequence[str], target: float = TARGET, seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> Gains:  # fmt: skip
    """Gains of names, and of explanations that the pushes themselves suggest, with all controls.

    Args:
        model: The model.
        asked: Who gives log-probabilities and, where it answers questions, proposes explanations.
        latents: L latents.
        names: Name of each.
        target: KL of the pushes, in nats.
        seed: Seed of whose explanations the shuffled ones are.
        done: Called after every latent.
    """
    if not len(latents):
        return Gains(np.zeros(0, np.int64), {k: np.zeros((0, 0)) for k in KINDS}, [], target)
    nothing = Push(latents[0], 0.0)
    clean, before = model.say(nothing), model.say(nothing, tuning=True)
    texts: dict[str, list[list[str]]] = {kind: [] for kind in ("", RANDOM, ZERO)}
    own: dict[str, list[str]] = {"": [], RANDOM: []}
    about = []
    for j in latents:
        said: dict[str, Any] = {"latent": int(j)}
        for kind, of in (("", "latent"), (RANDOM, RANDOM)):
            push, kl = tuned(model, j, of, target)
            texts[kind].append(model.say(push))
            explanation, risen = found_by(model, asked, push, before)
            own[kind].append(explanation)
            figures = {"kl": kl, "strength": push.strength, "found": explanation, "risen": risen}
            said |= {f"{of}_{k}" if kind else k: v for k, v in figures.items()}
        texts[ZERO].append(model.say(Push(j, 0.0, ZERO)))
        about.append(said)
        done()

    def table(explanations: Sequence[str], kind: str) -> np.ndarray:
        rows = [gain(asked, [e] * len(clean), clean, t) if e else np.full(len(clean), np.nan)
                for e, t in zip(explanations, texts[kind], strict=True)]  # fmt: skip
        return np.stack(rows)

    others, of_others = misplaced(list(names), seed), misplaced(own[""], seed)
    made = ((names, ""), (others, ""), (names, RANDOM), (names, ZERO), (own[""], ""), (of_others, ""),
            (own[RANDOM], RANDOM))  # fmt: skip
    return Gains(np.array(latents, np.int64), {k: table(*m) for k, m in zip(KINDS, made, strict=True)}, about, target)


class LVLMSteerable:
    """A vision-language model that is pushed at the site of an SAE on its image rows.

    Args:
        host: The model.
        sae: The SAE.
        images: PIL images; the first ``tuning`` set the strength and choose the explanation, what is said of the others
            is scored.
        question: What is asked of each.
        tuning: How many.
        max_tokens: Length of what it says.
        seed: Seed of random directions.
    """

    def __init__(
        self, host: Any, sae: Any, images: Sequence[Any], question: str = "Describe the image.", tuning: int = 10,
        max_tokens: int = 8, seed: int = 0,
    ):  # fmt: skip
        from mmsae.interpret.names.steering import image_site

        self.host, self.sae, self.seed, self.max_tokens = host, sae, seed, max_tokens
        self.site = image_site(host, sae)
        batches = [
            host.collate.batch([question] * len(part), list(part)) for part in (images[:tuning], images[tuning:])
        ]
        self.tuning, self.scoring = batches
        before = self.say(Push(0, 0.0), tuning=True)
        self.forced = host.collate.batch([question] * len(before), list(images[:tuning]), before)
        self.clean = self._logs()

    def _logs(self) -> Any:
        """``(tokens, vocabulary)`` log-probabilities of each next token of what it says of the tuning images unpushed;
        where that is nothing, of the first token alone.
        """
        import torch

        from mmsae.hosts.lvlm.tokens import ANSWER

        said = self.forced.inputs["kinds"] == ANSWER
        if said.any():
            logits = self.host.forward(self.forced).logits[:, :-1][said[:, 1:].to(self.host.device)]
        else:
            logits = self.host.forward(self.tuning).logits[:, -1]
        return torch.log_softmax(logits.float(), -1)

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
        """Mean KL of each next token of what it says of the tuning images unpushed."""
        with self._attached(push):
            logs = self._logs()
        return float((self.clean.exp() * (self.clean - logs)).sum(-1).mean())

    def risen(self, push: Push) -> list[str]:
        """Words that are likelier to be next in what it says of the tuning images, up to :data:`MOST`."""
        with self._attached(push):
            rise = (self._logs().exp() - self.clean.exp()).mean(0)
        tokenizer, out = self.host.processor.tokenizer, []
        for token in rise.argsort(descending=True)[: 4 * MOST].tolist():
            word = tokenizer.decode([token], skip_special_tokens=True).strip().lower()
            if rise[token] > 0 and any(c.isalpha() for c in word) and word not in out:
                out.append(word)
        return out[:MOST]

    def say(self, push: Push, tuning: bool = False) -> list[str]:
        """What it says of the scoring images, or of the tuning ones."""
        with self._attached(push):
            return self.host.answer(self.tuning if tuning else self.scoring, max_new_tokens=self.max_tokens)

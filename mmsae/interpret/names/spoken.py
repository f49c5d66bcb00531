"""Candidates that a language or vision-language model says, for the latents that it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.local import LocalClient
from mmsae.interpret.guesses import Candidates
from mmsae.interpret.names.choose import as_candidates
from mmsae.interpret.names.job import WITH_MODEL, Naming
from mmsae.interpret.names.lvlm import explained
from mmsae.interpret.names.phrases import BestPhrases
from mmsae.interpret.names.steering import ASKS, MAX_TOKENS, TIMES, steered_answers
from mmsae.interpret.shown import ItemViews
from mmsae.jobs.estimate import progress_bar
from mmsae.types import IMAGE, InputError

TOP = 9  # images of a latent that a steered model is shown


def drawn(latents: np.ndarray, most: int, seed: int) -> np.ndarray:
    """``most`` of the latents (0: all), by a seed, in order."""
    if not most or most >= len(latents):
        return latents
    return np.sort(np.random.default_rng(seed).permutation(latents)[:most])


def spoken_candidates(naming: Naming, asked: Asked, most: int, progress: bool = False) -> list[Candidates]:
    """What a model suggests, by the methods ``lvlm`` (the default) and ``steering`` (when asked for).

    Raises:
        InputError: A method was asked for that the model, the SAE or the evidence does not allow.
    """
    methods = [m for m in naming.looking.methods if m in WITH_MODEL] or ["lvlm"]
    out = []
    for m, latents in naming.latents.items():
        some = drawn(latents, 0 if naming.looking.latents else most, naming.looking.seed)
        if not len(some):
            continue
        for method in methods:
            if method == "steering" and m != IMAGE:
                continue
            with progress_bar(f"asking, {method}", "latent", progress, len(some)) as bar:
                say = _explain if method == "lvlm" else _steer
                names = say(naming, m, some, asked, bar.update)
            out += _rows(naming, method, m, names)
            naming.speakers[method] = asked.name
    return out


def _explain(naming: Naming, m: str, latents: np.ndarray, asked: Asked, done: Callable) -> dict[int, list[str]]:
    about = naming.ev.about
    if not (about["images"] if m == IMAGE else about["captions"]):
        raise InputError(f"method lvlm shows {m}s, and {naming.ev.folder} has none")
    found = explained(latents.tolist(), ItemViews(naming.ev, m), naming.examples(m), asked, done)
    return {j: [name] for j, name in found.items()}


def _steer(naming: Naming, m: str, latents: np.ndarray, asked: Asked, done: Callable) -> dict[int, list[str]]:
    client = asked.client
    if not isinstance(client, LocalClient) or not client.sees:
        raise InputError(
            f"method steering needs a vision-language model in this process (local:lvlm:...), not {client.name}"
        )
    if naming.sae is None:
        raise InputError("method steering needs the SAE: name it with --sae")
    host, ev = client.host, naming.ev
    if host.fingerprint != ev.about["job"]["host"]:
        raise InputError(f"method steering puts latents into the SAE's host, and {client.name} is another model")
    top, views = ev.top(m).item, ItemViews(ev, m)

    def items(latent: int) -> list[int]:
        return [i for i in top[latent].tolist() if i >= 0 and ev.items.half[i] == "train"][:TOP]

    def images(latent: int) -> list:
        return [image for i in items(latent) if (image := views.image(i)) is not None]

    mean = dict(zip(latents.tolist(), np.abs(ev.stats(m).mean_active[latents]).tolist(), strict=True))
    asks = (naming.looking.question,) * 2 if naming.looking.question else ASKS

    def kept(latent: int, answers: Callable[[], list[str]]) -> list[str]:
        said = {"sae": ev.about["job"]["sae"], "host": host.fingerprint, "latent": latent, "mean": mean[latent]}
        said |= {"images": [ev.items.uid[i] for i in items(latent)], "times": list(TIMES), "asks": list(asks)}
        return asked.once({"steering": said | {"max_tokens": MAX_TOKENS}}, answers) or []

    model = naming.sae.to(host.device)
    return steered_answers(host, model, list(mean), list(mean.values()), images, asks=asks, done=done, kept=kept)


def _rows(naming: Naming, method: str, m: str, names: Mapping[int, Sequence[str]]) -> list[Candidates]:
    """Answers as rows, several of one latent too."""
    latents = np.array([j for j, own in names.items() for _ in own], np.int64)
    phrases = [p for own in names.values() for p in own]
    judges = naming.judges(m)
    if not phrases or not judges:
        return []
    none = np.full((len(phrases), 1), np.nan)
    best = BestPhrases(latents, np.arange(len(phrases))[:, None], none, none, none)
    return [as_candidates(best, phrases, method, m, judges, naming.examples(m).of(latents))]

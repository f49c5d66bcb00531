"""The job of ``mmsae attributes``: what is drawn under every feature, and what the judge says of it.

One part is all images under one feature, kept as the judge's embeddings, so that a killed run goes on and no image is
held but those that are shown.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsae.files import atomic_file, disk_errors
from mmsae.hosts import load_host, pick_device
from mmsae.interpret.attributes.file import FILE, write_attributes
from mmsae.interpret.attributes.options import Acting, Discovering
from mmsae.interpret.names.vocabulary import read_vocabulary
from mmsae.jobs.estimate import duration, progress_bar
from mmsae.jobs.folder import JobFolder
from mmsae.metrics.statistics import wilson
from mmsae.options import Drawing, OneProcessRun, at_least
from mmsae.sae import SAE, random_control
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.steering.edits.attach import attach
from mmsae.steering.edits.edit import Edit
from mmsae.steering.edits.intervention import Intervention
from mmsae.steering.edits.units import FeatureStats
from mmsae.steering.measure.scorers import CLIPJudge, Judge
from mmsae.steering.measure.sweep import STRIDE, Item, check, noise
from mmsae.steering.methods.attributes import Attribute, SteeredPairs, clip_choice, confirm, discover
from mmsae.steering.recipe import load_site, read_prompts
from mmsae.types import IMAGE, TEXT, InputError

PARTS, STATS = "parts", "stats"
NONE, FEATURE, RANDOM, DIRECTION = "unsteered", "feature", "random", "direction"
LEAST_PROMPTS = 4  # two that discover and two that confirm: an interval is over prompts


class Way(NamedTuple):
    """How images are drawn."""

    kind: str  #: One of NONE, FEATURE, RANDOM and DIRECTION
    latent: int = -1  #: Which feature's atom, or which direction

    @property
    def file(self) -> str:
        """Name of the part."""
        return f"{self.kind}-{self.latent}.safetensors" if self.latent >= 0 else f"{self.kind}.safetensors"


class Discovered(NamedTuple):
    """What was found."""

    features: dict[int, list[Attribute]]  #: Words of each feature that was asked about, confirmed or not
    directions: dict[int, list[Attribute]]  #: The same of random directions
    kept: dict[Way, float]  #: Mean cosine of the images with and without
    relative: dict[Way, float]  #: Mean ``|dx| / |x|`` of the rows that were changed

    def rates(self) -> dict[str, Any]:
        """How many features, and how many directions, have a word, and one that was confirmed."""
        out = {}
        for kind, found in (("features", self.features), ("directions", self.directions)):
            hits = sum(any(a.confirmed for a in x) for x in found.values())
            low, high = wilson(hits, len(found)) if found else (None, None)
            out[kind] = {"asked": len(found), "words": sum(map(bool, found.values())), "confirmed": hits,
                         "low": low, "high": high}  # fmt: skip
        return out


class _Embedded:
    """A judge of images that are embeddings already."""

    def __init__(self, judge: Judge):
        self.texts = judge.texts

    def images(self, x: Tensor) -> Tensor:
        return x


class AttributeJob:
    """Arguments are those of :func:`~mmsae.interpret.attributes.command.attributes`.

    Raises:
        InputError: Options that do not go together, or a folder that holds another run.
    """

    def __init__(
        self, host: str, sae: str, judge: str, prompts: Sequence[str], out: Path, asked: Discovering, acting: Acting,
        drawing: Drawing, run: OneProcessRun,
    ) -> None:  # fmt: skip
        self.asked, self.acting, self.progress, self.size = asked, acting, run.progress, run.batch_size
        at_least(1, steps=drawing.steps, batch_size=run.batch_size, n_features=asked.n_features)
        at_least(0, directions=asked.directions, shown=asked.shown)
        at_least(2, random=asked.random)
        if len(asked.rates) != 2 or not 0 <= asked.rates[0] <= asked.rates[1] <= 1:
            raise InputError(f"rates {list(asked.rates)} are not a least and a largest share")
        if not asked.strength > 0:
            raise InputError(f"strength is {asked.strength}; it is a share of a row's length, above 0")
        self.words, self.texts = read_vocabulary(asked.vocabulary), read_prompts(prompts)
        if len(self.words) < 3:
            raise InputError(f"vocabulary {asked.vocabulary} has {len(self.words)} phrases; words are compared with "
                             "each other, which takes 3")  # fmt: skip
        if len(self.texts) < LEAST_PROMPTS:
            raise InputError(f"{len(self.texts)} different prompts are given; half discover and half confirm, which "
                             f"takes {LEAST_PROMPTS}")  # fmt: skip
        self.batches = check(self.texts, asked.seeds, (), run.batch_size)
        device = pick_device(run.device)
        options = {k: v for k, v in asdict(drawing).items() if v is not None}
        self.at = load_site(host, sae, acting.site, device, run, options)
        if wrong := [j for j in asked.features if not 0 <= j < self.at.sae.d_sae]:
            raise InputError(f"feature {wrong[0]} is asked about, and the SAE has {self.at.sae.d_sae}")
        self.judge_host = load_host(judge, device=device)
        self.judge = CLIPJudge(self.judge_host)
        if missing := {IMAGE, TEXT} - set(self.judge.host.modalities):
            raise InputError(f"judge {judge} embeds no {missing.pop()}s; it must embed images and texts")
        job = {
            "host": self.at.host.fingerprint, "sae": sae_fingerprint(self.at.sae), "site": str(self.at.site),
            "judge": self.judge_host.fingerprint, "prompts": self.texts, "words": self.words, **asdict(asked),
            **asdict(acting), "drawing": options, "batch_size": run.batch_size, "stride": STRIDE,
        }  # fmt: skip
        self.files = JobFolder(out, job, "mmsae attributes", result=FILE)
        self.folder, self.path = out, out / FILE

    def run(self) -> Discovered:
        """Draw what is missing, and say what was found.

        Raises:
            InputError: Too few live features.
        """
        with disk_errors(self.folder):
            try:
                ways = self._ways()
            except InputError:
                self.files.discard((STATS,))
                raise
            self._draw(ways)
            return self._discover(ways)

    def write(self, found: Discovered) -> Path:
        """Write the file, by which the run is known to be finished."""
        more = {"rates": found.rates(), "job": self.files.job}
        return write_attributes(self.path, found.features, self.files.job["sae"], **more)

    def shown(self) -> dict[Way, Tensor]:
        """``(n, 3, H, W) uint8`` images of the first held-out prompts that are shown."""
        return {way: load_file(self.folder / PARTS / way.file)["images"]
                for way in self._ways() if way.kind in (NONE, FEATURE)}  # fmt: skip

    def _ways(self) -> list[Way]:
        """Everything that is drawn."""
        path, asked = self.folder / STATS, self.asked
        if path.exists():
            stats = FeatureStats.load(path)
        else:
            seed = asked.seeds[0] - 1  # the noise of no image that is compared
            stats = self.at.stats(self.texts, seed).save(path)
        generator = torch.Generator().manual_seed(asked.seed)
        drawn = stats.live(*asked.rates)
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
        features = list(dict.fromkeys(asked.features)) or sorted(drawn[: asked.n_features].tolist())
        live = [j for j in stats.live().tolist() if j not in set(features)]
        if not features or len(live) < asked.random:
            raise InputError(
                f"{len(drawn)} features fire on {asked.rates[0]:g} to {asked.rates[1]:g} of the prompts' rows, and "
                f"{len(live)} others are live: {asked.random} to compare with are asked for; change rates or random"
            )
        order = torch.randperm(len(live), generator=generator)[: asked.random].tolist()
        return [Way(NONE), *(Way(FEATURE, j) for j in features), *(Way(RANDOM, live[i]) for i in order),
                *(Way(DIRECTION, j) for j in range(min(asked.directions, self.at.sae.d_sae)))]  # fmt: skip

    def _draw(self, ways: Sequence[Way]) -> None:
        (self.folder / PARTS).mkdir(exist_ok=True)
        todo = [w for w in ways if not (self.folder / PARTS / w.file).exists()]
        other = random_control(self.at.sae, self.asked.seed)
        images = len(self.texts) * len(self.asked.seeds)
        if self.progress:
            kinds = {k: sum(w.kind == k for w in ways) for k in (FEATURE, RANDOM, DIRECTION)}
            print(
                f"attributes: {kinds[FEATURE]} features, {kinds[RANDOM]} random ones and {kinds[DIRECTION]} random "
                f"directions at {self.at.site.module}, {len(self.words)} words: {len(ways) * images} images"
            )
        start = time.monotonic()
        with warnings.catch_warnings(), progress_bar("attributes", "feature", self.progress, len(todo)) as bar:
            warnings.filterwarnings("ignore", message=".*may break")  # how far rows move is said, and the same for all
            for i, way in enumerate(todo):
                with atomic_file(self.folder / PARTS / way.file) as temp:
                    save_file(self._part(way, other), temp)
                bar.update()
                left = (time.monotonic() - start) * (len(todo) - 1)
                if self.progress and i == 0 and left > 30:
                    bar.write(f"about {duration(left)} left")

    @torch.no_grad()
    def _part(self, way: Way, other: SAE) -> dict[str, Tensor]:
        """The judge's embeddings of all images, some of the images, and how far rows moved."""
        embedded, pixels, relative = [], [], []
        seeds = self.asked.seeds
        shown = {Item(p, noise(seeds[0], i)) for i, p in list(enumerate(self.texts))[1::2][: self.asked.shown]}
        for items in self.batches:
            context: Any = nullcontext()
            if way.kind != NONE:
                iv = Intervention(Edit.add([way.latent], 1.0), "rel_norm", strength=self.asked.strength,
                                  branch=self.acting.branch, tokens=self.acting.tokens)  # fmt: skip
                context = attach(self.at.host, {self.at.site: (other if way.kind == DIRECTION else self.at.sae, iv)})
            prompts, noises = map(list, zip(*items, strict=True))
            with context as log:
                images = self.at.host.generate(prompts, seed=noises, **{"batch_size": len(items), **self.at.options})
            embedded.append(self.judge.images(images).float().cpu())
            relative.append(0.0 if log is None else log.relative)
            own = images[[item in shown for item in items]].cpu()
            pixels.append((own.clamp(0, 1) * 255).round().byte())
        return {
            "embedding": torch.cat(embedded).contiguous(),
            "images": torch.cat(pixels).contiguous(),
            "relative": torch.tensor(sum(relative) / len(relative)),
        }

    def _discover(self, ways: Sequence[Way]) -> Discovered:
        parts = {w: load_file(self.folder / PARTS / w.file) for w in ways}
        prompts = [i.prompt for items in self.batches for i in items]
        held = torch.tensor([self.texts.index(p) % 2 == 1 for p in prompts])
        before, judge = parts[ways[0]]["embedding"], _Embedded(self.judge)

        def pairs(way: Way, half: Tensor) -> SteeredPairs:
            own = [p for p, h in zip(prompts, half.tolist(), strict=True) if h]
            return SteeredPairs(before[half], parts[way]["embedding"][half], own)

        def others() -> Iterator[SteeredPairs]:
            return (pairs(w, ~held) for w in ways if w.kind == RANDOM)

        found: dict[str, dict[int, list[Attribute]]] = {FEATURE: {}, DIRECTION: {}}
        for way in ways:
            if way.kind in found:
                words = discover(judge, pairs(way, ~held), others(), self.words, self.asked.threshold)
                found[way.kind][way.latent] = confirm(words, pairs(way, held), clip_choice(judge), self.asked.seed)
        kept = {w: float((before * p["embedding"]).sum(1).mean()) for w, p in parts.items()}
        relative = {w: float(p["relative"]) for w, p in parts.items()}
        return Discovered(found[FEATURE], found[DIRECTION], kept, relative)

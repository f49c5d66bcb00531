"""The work of ``mmsae name``: candidates of every method, the best of each latent, and whether it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.errors import NothingToGoBy
from mmsae.files import write_json
from mmsae.interpret.embedder import Embedder, known_vectors
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.guesses import FOLDER, Candidates
from mmsae.interpret.names.captions import caption_scores, count_phrases
from mmsae.interpret.names.centroid import centroid_scores, centroids, mean_of
from mmsae.interpret.names.choose import Examples, Judge, as_candidates, choose, fewest, judged, least_auroc, names_of
from mmsae.interpret.names.decoder import decoder_scores
from mmsae.interpret.names.options import Holding, Looking
from mmsae.interpret.names.phrases import PhraseScores, best_phrases
from mmsae.interpret.names.unseen import unseen
from mmsae.interpret.names.vocabulary import read_vocabulary
from mmsae.interpret.names.wpmi import strongest, wpmi_scores
from mmsae.interpret.scores.clip_judge import judge_by_vectors, judge_by_words
from mmsae.metrics.concepts.names import FILE, LatentName, write_names
from mmsae.types import IMAGE, TEXT, InputError

WITHOUT_MODEL = ("captions", "wpmi", "centroid", "vocabulary")
WITH_MODEL = ("lvlm", "steering")
ABOUT = "about.json"


class Named(NamedTuple):
    """What was found."""

    names: dict[int, LatentName]  #: Of every latent; those without a name have None, and the reason
    candidates: Candidates  #: What was tried
    about: dict[str, Any]  #: Methods, what was left out and why, counts


class Naming:
    """Names of the latents of one folder of evidence.

    Args:
        evidence: The folder.
        looking: How names are looked for.
        holding: When they hold.
        sae: The SAE, for the methods ``vocabulary`` and ``steering``; None: those are left out.
        device: Where the embedder runs.
        cache: Whether vectors of phrases are kept beside the evidence.

    Raises:
        InputError: There is nothing to name by, or a method was asked for that cannot be.
    """

    def __init__(
        self,
        evidence: Evidence,
        looking: Looking = Looking(),
        holding: Holding = Holding(),
        sae: Any = None,
        device: str = "auto",
        cache: bool = True,
    ):
        self.ev, self.looking, self.holding, self.sae, self.device = evidence, looking, holding, sae, device
        self.cache = evidence.folder / FOLDER / "vectors" if cache else None
        self.left_out: dict[str, str] = {}
        self.speakers: dict[str, str] = {}
        unknown = [m for m in looking.methods if m not in WITHOUT_MODEL + WITH_MODEL]
        if unknown:
            raise InputError(f"no method {unknown[0]!r}: they are {', '.join(WITHOUT_MODEL + WITH_MODEL)}")
        if looking.modality != "auto" and looking.modality not in evidence.modalities:
            raise InputError(f"modality is {looking.modality}, but {evidence.folder} is evidence of "
                             f"{', '.join(evidence.modalities)}")  # fmt: skip
        if any(not 0 <= j < evidence.d_sae for j in looking.latents):
            bad = next(j for j in looking.latents if not 0 <= j < evidence.d_sae)
            raise InputError(f"there is no latent {bad}: {evidence.folder} is of {evidence.d_sae} latents")

    # What there is.

    @cached_property
    def keep(self) -> np.ndarray:
        """``(n,)`` bool: items of the train half that are nobody's copy."""
        return (self.ev.items.half == "train") & (self.ev.items.copy_of < 0)

    @cached_property
    def latents(self) -> dict[str, np.ndarray]:
        """``{modality: latents that are named by its evidence}``."""
        out, taken = {}, np.zeros(self.ev.d_sae, bool)
        for m in self.ev.modalities if self.looking.modality == "auto" else [self.looking.modality]:
            has = (self.examples(m).positive >= 0).any(1) & ~taken
            if self.looking.latents:
                has &= np.isin(np.arange(self.ev.d_sae), self.looking.latents)
            out[m] = np.flatnonzero(has)
            taken |= has
        return out

    def examples(self, modality: str) -> Examples:
        """Positives and negatives of all latents, of the train half."""
        return self._examples[modality]

    @cached_property
    def _examples(self) -> dict[str, Examples]:
        kinds = ("positive", "random", "hard")
        return {m: Examples(*(self.ev.examples(m, "train", k) for k in kinds)) for m in self.ev.modalities}

    def unseen_items(self, modality: str) -> np.ndarray:
        """``(d_sae,)`` number of unseen items that are nobody's copies on which each latent fires."""
        test = (self.ev.items.half == "test") & (self.ev.items.copy_of < 0)
        lists = self.ev.lists(modality)
        latent = np.repeat(np.arange(lists.n), np.diff(lists.start))
        return np.bincount(latent[test[lists.index] & (lists.value != 0)], minlength=lists.n)

    @cached_property
    def captions(self) -> list[str]:
        return self.ev.items.caption

    @cached_property
    def has_captions(self) -> bool:
        return any(self.captions)

    @cached_property
    def templates(self) -> list[str]:
        from mmsae.evaluation.labels import read_templates

        return read_templates(self.looking.templates)

    @cached_property
    def embedders(self) -> dict[str, Embedder]:
        """``{modality: encoder of its embeddings}``, which has a text tower or, for the default vocabulary, classes."""
        out: dict[str, Embedder] = {}
        for m in self.ev.modalities:
            found = Embedder.of(self.ev, m, cache=self.cache, device=self.device)
            if found is None:
                self.left_out[f"vectors of {m}s"] = "the evidence has no embeddings"
                continue
            same = next((e for e in out.values() if e.name == found.name), found)
            if same.reads_text or (same.classes and self.looking.vocabulary == Looking.vocabulary):
                out[m] = same
            else:
                known = "its classes have names, which are the default vocabulary alone" if same.classes else ""
                self.left_out[f"vectors of {m}s"] = f"{found.name} has no text tower" + (known and f"; {known}")
        return out

    @cached_property
    def phrases(self) -> list[str]:
        """The vocabulary; where no encoder reads text, the classes that one knows."""
        if self.embedders and not any(e.reads_text for e in self.embedders.values()):
            return list(next(iter(self.embedders.values())).classes)
        if self.looking.vocabulary != "captions":
            return read_vocabulary(self.looking.vocabulary)
        if not self.has_captions:
            raise InputError(f"vocabulary is captions, but {self.ev.folder} has no captions")
        rows = np.flatnonzero(self.keep)
        return count_phrases([self.captions[i] for i in rows.tolist()], self.looking.longest)[0]

    def vectors(self, modality: str, phrases: Sequence[str]) -> np.ndarray:
        """``(V, width)`` of phrases; those for texts stand as they are, without templates."""
        return self.embedders[modality].phrases(phrases, self.templates if modality == IMAGE else ["{}"])

    # Methods.

    def tables(self) -> dict[tuple[str, str], Callable[[], PhraseScores]]:
        """``{(method, modality): how its scores are made}`` of what can be done; the rest is noted in ``left_out``."""
        asked, out = self.looking.methods or WITHOUT_MODEL, {}
        for m, latents in self.latents.items():
            if not len(latents):
                continue
            if "captions" in asked and self._can("captions", self.has_captions, "the evidence has no captions"):
                out["captions", m] = partial(
                    caption_scores, self.ev.codes(m), latents, self.captions, self.keep, self.looking.longest,
                    self.looking.seed,
                )  # fmt: skip
            for method in ("wpmi", "centroid", "vocabulary"):
                why = self.left_out.get(f"vectors of {m}s", "") if m not in self.embedders else ""
                why = why or (self._not_joint(m) if method == "vocabulary" else "")
                if not why and method == "wpmi" and len(self.phrases) < 2:
                    why = "of a vocabulary of one phrase every item has it"
                if method in asked and self._can(method, not why, why):
                    out[method, m] = partial(getattr(self, f"_{method}"), m, latents)
        return out

    def _can(self, method: str, can: bool, why: str) -> bool:
        if not can and method in self.looking.methods:
            raise InputError(f"method {method} cannot be used: {why}")
        if not can:
            self.left_out[method] = why
        return can

    def _wpmi(self, m: str, latents: np.ndarray) -> PhraseScores:
        top = strongest(self.ev.lists(m), self.keep, self.looking.top)
        return wpmi_scores(top, latents, self.phrases, self.ev.embeddings(m), self.vectors(m, self.phrases))

    def _centroid(self, m: str, latents: np.ndarray) -> PhraseScores:
        means = centroids(self.ev.codes(m), self.ev.embeddings(m), self.keep)
        return centroid_scores(means, latents, self.phrases, self.vectors(m, self.phrases))

    def _vocabulary(self, m: str, latents: np.ndarray) -> PhraseScores:
        vectors = self.vectors(m, self.phrases)
        images, texts = self.ev.embeddings(IMAGE), self.ev.embeddings(TEXT)
        low = vectors.mean(0) if texts is None else mean_of(texts, self.keep)
        direction = np.zeros_like(low) if images is None else mean_of(images, self.keep) - low
        atoms = self.sae.dictionaries["shared" if "shared" in self.sae.dictionaries else m].rows()
        return decoder_scores(atoms.detach().cpu().numpy(), latents, self.phrases, vectors, direction)

    def _not_joint(self, m: str) -> str:
        """Why atoms are not in the space of the phrases; empty where they are."""
        if self.sae is None:
            return "no SAE was named (--sae)"
        site = self.sae.sites.get(m)
        if site is None or site.module not in ("image.embed", "text.embed"):
            return f"the SAE reads {site.module if site else 'no site'} of its host, which is no joint space"
        if self.embedders[m].host.fingerprint != self.ev.about["job"]["host"]:
            return f"the embeddings are of {self.embedders[m].name}, not of the SAE's host"
        return ""

    # Choosing.

    def judges(self, modality: str) -> dict[str, Judge]:
        """What tells items apart by a phrase, by name; empty where nothing can.

        Embeddings of the SAE's own host are no judge where captions can be one: whatever its latents fire on looks
        alike to it, those of random weights too.
        """
        which, out = self.holding.judge, {}
        own = modality in self.embedders and self.embedders[modality].host.fingerprint == self.ev.about["job"]["host"]
        if which == "auto" and own and self.has_captions:
            which = "words"
            self.left_out["judging by vectors"] = f"{self.embedders[modality].name} is the SAE's own host"
        if which != "words" and modality in self.embedders:
            out["vectors"] = partial(self._by_vectors, modality)
        if which != "vectors" and self.has_captions:
            out["words"] = self._by_words
        return out

    def _by_words(
        self, on: np.ndarray, off: np.ndarray, phrases: Sequence[Sequence[str]], weight: np.ndarray | None
    ) -> np.ndarray:
        return judge_by_words(on, off, self.captions, phrases, weight)

    def _by_vectors(
        self, m: str, on: np.ndarray, off: np.ndarray, phrases: Sequence[Sequence[str]], weight: np.ndarray | None
    ) -> np.ndarray:
        distinct = list(dict.fromkeys(p for own in phrases for p in own))
        at = {p: i for i, p in enumerate(distinct)}
        places = np.array([[at[p] for p in own] for own in phrases]).reshape(len(phrases), -1)
        table = known_vectors(self.embedders[m], distinct, self.templates if m == IMAGE else ["{}"])
        return judge_by_vectors(on, off, self.ev.embeddings(m), table[places], weight)

    def run(
        self,
        say: Callable[[str], None] = lambda said: None,
        asked: Sequence[Candidates] = (),
        least: Mapping[str, float] | None = None,
    ) -> Named:
        """Find names; ``asked`` are candidates that a language model gave, ``least`` is what :meth:`least` of a control
        says.
        """
        found, tables, judges = self._found(say, asked)
        items = {m: self.unseen_items(m) for m in judges}
        names = names_of(found, items, self.holding, self.by(), least)
        return Named(names | self._silent(names), found, self._about(names, tables, judges) | {"least": least or {}})

    def least(self, say: Callable[[str], None] = lambda said: None) -> dict[str, float]:
        """``{modality: least AUROC}`` of a name, where these latents are those of a control: what no more of them than
        ``holding.false_names`` reach.

        Modalities in which the control has too few latents for that share are left out.

        Raises:
            InputError: It has too few in every modality, or the share is none.
        """
        h = self.holding
        if not 0 < h.false_names < 1:
            raise InputError(f"false_names is {h.false_names:g}, it must be a share between 0 and 1")
        found, _, judges = self._found(say, ())
        n = {m: len(self.latents[m]) for m in judges}
        enough = [m for m in n if n[m] >= fewest(h.false_names)]
        return {
            m: least_auroc(found, m, n[m], self.unseen_items(m), h, h.false_names)
            for m in enough or sorted(n, key=n.get)[-1:]  # where none has enough, the one that lacks least says so
        }

    def _found(self, say: Callable[[str], None], asked: Sequence[Candidates]) -> tuple[Candidates, Any, Any]:
        """Candidates of all methods, the best of each latent chosen and judged."""
        if not any(map(len, self.latents.values())):
            raise NothingToGoBy(self._without_evidence())
        judges = {m: j for m in self.latents if (j := self.judges(m))}
        tables = self.tables()
        if not (tables or self.speakers) or not judges:
            reasons = "; ".join(f"{k}: {v}" for k, v in self.left_out.items())
            raise NothingToGoBy(
                f"{self.ev.folder} has nothing to name latents by ({reasons}): it needs "
                "captions, or embeddings of a host with a text tower (mmsae evidence --embedder)"
            )
        parts = list(asked)
        for (method, m), make in tables.items():
            if m in judges:
                say(f"{method}, {len(self.latents[m]):,} latents by {m}s")
                table = make()
                best = best_phrases(table, self.looking.candidates, self.looking.hubs)
                train = self.examples(m).of(best.latents)
                parts.append(as_candidates(best, table.phrases, method, m, judges[m], train))
        found = choose(Candidates.joined(parts), self.holding)
        found = judged(found, lambda m, latents: unseen(self.ev, m, latents, self.looking.seed), judges)
        return found, tables, judges

    def _without_evidence(self) -> str:
        """Why there is no latent to name."""
        asked = self.looking.latents
        why = Counter(self._silent({})[j].note for j in asked or range(self.ev.d_sae))
        if len(asked) == 1:
            return f"latent {asked[0]} of {self.ev.folder} {next(iter(why))}: there is nothing to name it by"
        silent = why["never fires"]
        few = f"{why.total() - silent:,} fire on too few items (mmsae evidence --min-items)"
        of = f"of the {len(asked):,} latents asked for" if asked else f"of {self.ev.d_sae:,} latents"
        return f"{of} none has evidence in {self.ev.folder}: {silent:,} never fire, {few}"

    def by(self) -> dict[str, str]:
        """``{method: who}``."""
        who = {m: e.name for m, e in self.embedders.items()}
        return (
            {m: next(iter(who.values()), "") for m in ("wpmi", "centroid", "vocabulary")}
            | {"captions": "captions"}
            | self.speakers
        )

    def _silent(self, names: dict[int, LatentName]) -> dict[int, LatentName]:
        stats = [self.ev.stats(m).fired_items for m in self.ev.modalities]
        fired, out = np.maximum.reduce(stats), {}
        tried = set(np.concatenate([*self.latents.values()]).tolist())
        for j in self.looking.latents or range(self.ev.d_sae):
            if j not in names:
                why = f"fires on {fired[j]:,} items: too few for evidence" if fired[j] else "never fires"
                why = "nothing was suggested" if j in tried else why
                out[j] = LatentName(None, "captions" if self.has_captions else "centroid", note=why)
        return out

    def _about(self, names: dict[int, LatentName], tables: Any, judges: Any) -> dict[str, Any]:
        held = [n for n in names.values() if n.name]
        return {
            "looking": self.looking.__dict__, "holding": self.holding.__dict__,
            "methods": sorted({method for method, _ in tables} | set(self.speakers)), "left_out": self.left_out,
            "judges": {m: list(j) for m, j in judges.items()},
            "latents": self.ev.d_sae, "with_evidence": sum(map(len, self.latents.values())), "suggested": len(names),
            "named": len(held),
            "by_method": dict(Counter(n.method for n in held)),
        }  # fmt: skip


def check_control(evidence: Evidence, control: Evidence) -> Evidence:
    """``control``, which must be evidence of another SAE than ``evidence``, on the same host.

    Raises:
        InputError: It is not.
    """
    mine, other = evidence.about["job"], control.about["job"]
    if other["sae"] == mine["sae"]:
        raise InputError(f"control {control.folder} is evidence of the SAE itself: collect some of random weights")
    if other["host"] != mine["host"]:
        raise InputError(f"control {control.folder} is evidence on host {other['host'][:12]}, and {evidence.folder} on "
                         f"{mine['host'][:12]}")  # fmt: skip
    return control


def write_named(folder: Path, named: Named, sae: str) -> Path:
    """Write ``names.json``, ``candidates.parquet`` and ``about.json``; returns the path of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    named.candidates.write(folder)
    write_json(folder / ABOUT, named.about)
    return write_names(folder / FILE, named.names, sae)

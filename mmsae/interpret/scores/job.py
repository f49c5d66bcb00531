"""The work of ``mmsae score``: every scorer on the SAE's names, on random-weight latents, and on shuffled names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.errors import NothingToGoBy
from mmsae.files import null_for_nan, read_text, write_json
from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.embedder import Embedder, known_vectors
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.hosts import NamedHost
from mmsae.interpret.guesses import FOLDER, Candidates
from mmsae.interpret.names.job import ABOUT, Naming, check_control
from mmsae.interpret.names.options import Holding, Looking
from mmsae.interpret.scores import asking, vectors
from mmsae.interpret.scores.options import Judging
from mmsae.interpret.scores.outcomes import Scores, auroc_scores
from mmsae.interpret.scores.simulation import simulated, simulated_by
from mmsae.interpret.scores.subjects import Names, Subjects
from mmsae.interpret.scores.surprisal import surprisal
from mmsae.interpret.scores.table import SUMMARY, ScoreRows, summary
from mmsae.interpret.shown import ItemViews
from mmsae.metrics.concepts.names import FILE, names_only, read_names
from mmsae.types import IMAGE, TEXT, InputError

OFFLINE = ("judge", "embedding", "simulation", "example_embedding", "intruder")
CROPS = "judge_crops"
ASKED = ("detection", "fuzzing", "simulation_asked", "intruder_asked", "pointing", "surprisal")
PUSHED = "intervention"
UNNAMED = ("example_embedding", "intruder", "intruder_asked")  # what they show is the latent, whatever it is called
CROPPED = 10  # items of a latent whose crops are judged


def names_in(evidence: Evidence) -> dict[str, Names]:
    """``{modality: names}`` of a folder of evidence: those in its ``names.json``, and the best guess where none held.

    Where ``mmsae name`` has not been there, guesses are made now and not kept.
    """
    path = evidence.folder / FOLDER
    if (path / FILE).exists():
        names = names_only(read_names(path / FILE, evidence.about["job"]["sae"]))
        return _names(evidence.modalities, Candidates.read(evidence.folder), names)
    named = Naming(evidence, cache=False).run()
    return _names(evidence.modalities, named.candidates, names_only(named.names))


def _names(modalities: Sequence[str], found: Candidates, names: Mapping[int, str]) -> dict[str, Names]:
    chosen, out = found.rows(found.chosen), {}
    for m in modalities:
        own = chosen.rows(chosen.modality == m)
        phrases = [names.get(j, p) for j, p in zip(own.latent.tolist(), own.phrase.tolist(), strict=True)]
        held = np.array([j in names for j in own.latent.tolist()], bool)
        out[m] = Names(own.latent.astype(np.int64), phrases, held)
    return out


class _Before(NamedTuple):
    """How names were looked for."""

    looking: Looking
    holding: Holding
    least: dict[str, float]


def _as_before(evidence: Evidence) -> _Before:
    """How the names of some evidence were looked for; the defaults where nobody did, and for what another version has
    not written.
    """
    path = evidence.folder / FOLDER / ABOUT
    if not path.exists():
        return _Before(Looking(), Holding(), {})
    try:
        said = json.loads(read_text(path))
        looking, holding = (
            {k: tuple(v) if isinstance(v, list) else v for k, v in said[part].items() if k in kind.__dataclass_fields__}
            for part, kind in (("looking", Looking), ("holding", Holding))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path} does not say how names were looked for: run mmsae name again") from e
    return _Before(Looking(**looking | {"latents": (), "methods": ()}), Holding(**holding), said.get("least") or {})


def _fits(scorer: str, control: str) -> bool:
    """Whether a control says something of a scorer: without a name there is none to shuffle, and with one that is
    enough.
    """
    return control in (("", "dealt", "random") if scorer in UNNAMED else ("", "shuffled", "random"))


class ScoreJob:
    """Scores of the names of one folder of evidence, with controls.

    Args:
        evidence: The folder; ``mmsae name`` has been there, or guesses are made.
        control: Evidence of an SAE of random weights on the same data, or None.
        judging: What is scored.
        asked: Whom to ask; None: nobody.
        most: Latents that a client is asked about, of the SAE and of each control; 0: all.
        device: Where hosts run.
        sae: The SAE, for the scorer ``intervention``, which pushes the host along its latents.
        control_sae: That of the control, for the same of its latents.
    """

    def __init__(
        self,
        evidence: Evidence,
        control: Evidence | None = None,
        judging: Judging = Judging(),
        asked: Asked | None = None,
        most: int = 50,
        device: str = "auto",
        sae: Any = None,
        control_sae: Any = None,
    ):
        self.saes = {"": sae, "random": control_sae}
        self.ev, self.control, self.judging, self.asked = evidence, control, judging, asked
        self.most, self.device = most, device
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.pushes: list[dict[str, Any]] = []
        known = (*OFFLINE, CROPS, *ASKED, PUSHED)
        if bad := [n for n in judging.scorers if n not in known]:
            raise InputError(f"no scorer {bad[0]!r}: they are {', '.join(known)}")
        if asked is None and (bad := [n for n in judging.scorers if n in (*ASKED, PUSHED)]):
            raise InputError(f"scorer {bad[0]} asks a model: name one with --client")
        if PUSHED in judging.scorers and sae is None:
            raise InputError(f"scorer {PUSHED} needs the SAE (--sae), which pushes the host along its latents")
        if control:
            check_control(evidence, control)

    def subjects(self) -> list[Subjects]:
        """The SAE's latents, those of the control, and the SAE's with names of others, by modality."""
        out, found = [], names_in(self.ev)
        for m, names in found.items():
            if len(names.latents):
                own = Subjects(self.ev, m, names, negatives=self.judging.negatives)
                others = own.shuffled(self.judging.seed)
                out += [own, *[others] * (len(others.latents) > 0), own.dealt(self.judging.seed)]
                if set(self.judging.scorers or OFFLINE) - {*UNNAMED, PUSHED}:
                    self._can(f"names of others, by {m}s", len(others.latents) > 0, "all latents have one name")
        if self.control is not None:
            for m, names in self._control_names().items():
                if len(names.latents) and m in found:
                    out.append(Subjects(self.control, m, names, "random", self.judging.negatives))
        if not out:
            raise NothingToGoBy(f"{self.ev.folder} has no latent with a name or a guess: there is nothing to score")
        return out

    def _control_names(self) -> dict[str, Names]:
        assert self.control is not None
        if (self.control.folder / FOLDER / FILE).exists():
            return names_in(self.control)
        looking, holding, least = _as_before(self.ev)
        named = Naming(self.control, looking, holding, cache=False, device=self.device).run(least=least)
        return _names(self.control.modalities, named.candidates, names_only(named.names))

    # Spaces.

    @cached_property
    def templates(self) -> list[str]:
        from mmsae.evaluation.labels import read_templates

        return read_templates(self.judging.templates)

    @cached_property
    def _embedders(self) -> dict[str, Embedder]:
        return {}

    def embedder(self, ev: Evidence, modality: str) -> Embedder | None:
        """The encoder of a space: the judge's for images where one is named."""
        cache = self.ev.folder / FOLDER / "vectors"
        if self.judging.judge and modality == IMAGE:
            found = Embedder(self.judging.judge, cache, self.device)
        else:
            found = Embedder.of(ev, modality, cache=cache, device=self.device)
        return None if found is None else self._embedders.setdefault(found.name, found)

    def embeddings(self, s: Subjects, modality: str) -> np.ndarray | None:
        """``(n, width)`` in the space of a modality; of a judge only those of the subjects' items, others are 0."""
        if not (self.judging.judge and modality == IMAGE):
            return s.ev.embeddings(modality)
        found = self.embedder(s.ev, modality)
        views, table = ItemViews(s.ev, IMAGE), None
        used = np.unique(np.concatenate([t.ravel() for t in (s.positive, s.negative, *s.seen)]))
        used = used[used >= 0]
        for lo in range(0, len(used), 256):
            part = [(i, image) for i in used[lo : lo + 256].tolist() if (image := views.image(i)) is not None]
            rows = found.images([image for _, image in part])
            if table is None:
                table = np.zeros((s.ev.n, rows.shape[1]), np.float32)
            table[[i for i, _ in part]] = rows
        return table

    # Scorers.

    def scorers(self, s: Subjects) -> dict[str, Callable[[], Scores]]:
        """``{name: how}`` of what can be scored of some subjects; the rest is noted in ``left_out``."""
        out: dict[str, Callable[[], Scores]] = {}
        space = s.modality if s.ev.embeddings(s.modality) is not None or self.judging.judge else TEXT
        table = self.embeddings(s, space)
        for name in self.judging.scorers or OFFLINE:
            if not _fits(name, s.control):
                continue
            if name == "judge" and s.modality == IMAGE and self._has(name, s, IMAGE, table if space == IMAGE else None):
                out[name] = partial(self._by_name, s, IMAGE, table)
            elif name == "embedding" and self._has(name, s, TEXT, s.ev.embeddings(TEXT)):
                out[name] = partial(self._by_name, s, TEXT, s.ev.embeddings(TEXT))
            elif name == "simulation" and self._has(name, s, s.modality, table if space == s.modality else None):
                words = self._vectors(self.embedder(s.ev, s.modality), s.names.phrases, s.modality)
                out[name] = partial(simulated, s, table, words)
            elif name == "example_embedding" and self._can(name, table is not None, "the evidence has no embeddings"):
                out[name] = partial(vectors.example_scores, s, table)
            elif name == "intruder" and self._can(name, table is not None, "the evidence has no embeddings"):
                j = self.judging
                out[name] = partial(
                    vectors.intruder_scores, s, lambda sets: vectors.farthest(sets, table), j.set_size, j.trials, j.seed
                )
            elif name == CROPS and s.modality == IMAGE and self._has(name, s, IMAGE, table):
                if self._can(
                    name, s.ev.grid(IMAGE).places > 1 and s.ev.about["images"], "the site has no grid of patches"
                ):
                    out[name] = partial(self._crops, s)
        return out | (self._asked(s) if self.asked else {})

    def _can(self, name: str, can: bool, why: str) -> bool:
        if not can:
            self.left_out[name] = why
        return can

    def _has(self, name: str, s: Subjects, modality: str, table: np.ndarray | None) -> bool:
        if not self._can(name, table is not None, f"the evidence has no embeddings of {modality}s"):
            return False
        found = self.embedder(s.ev, modality)
        if found is None:
            return self._can(name, False, f"the evidence has no embeddings of {modality}s")
        return self._can(name, found.knows_words, f"{found.name} has no text tower, and no classes with names")

    def _by_name(self, s: Subjects, modality: str, table: np.ndarray) -> Scores:
        found = self.embedder(s.ev, modality)
        if modality == IMAGE and found.host.fingerprint == s.ev.about["job"]["host"]:
            self._note(
                f"judge: {found.name} is the host that is explained; another encoder judges more fairly (--judge)"
            )
        return vectors.name_scores(s, table, self._vectors(found, s.names.phrases, modality))

    def _vectors(self, found: Embedder, phrases: list[str], modality: str) -> np.ndarray:
        distinct = list(dict.fromkeys(phrases))
        at = {p: i for i, p in enumerate(distinct)}
        table = known_vectors(found, distinct, self.templates if modality == IMAGE else ["{}"])
        if unknown := int(np.isnan(table[:, 0]).sum()):
            self._note(
                f"{found.name} reads no text: {unknown:,} of {len(distinct):,} names are none of the classes that it "
                "knows, and are not judged by it"
            )
        return table[[at[p] for p in phrases]]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _crops(self, s: Subjects) -> Scores:
        """Is the name nearer to the crop where the latent is strongest than to a crop elsewhere in the same image?"""
        s = s.some(self.most, self.judging.seed)
        found, views, rng = self.embedder(s.ev, IMAGE), ItemViews(s.ev, IMAGE), np.random.default_rng(self.judging.seed)
        words, sides = self._vectors(found, s.names.phrases, IMAGE), np.full((2, len(s.latents), CROPPED), np.nan)
        for row, j in enumerate(s.latents.tolist()):
            shown = []
            for i in s.positive[row][s.positive[row] >= 0][:CROPPED].tolist():
                shape = s.ev.grid_of(i, IMAGE)
                elsewhere = tuple(rng.integers(0, shape).tolist())
                crops = [views.crop(i, j), views.crop(i, j, at=elsewhere)]
                shown += crops if None not in crops else []
            cosine = found.images(shown) @ words[row] if shown else np.zeros(0)
            for side in range(2):
                sides[side, row, : len(cosine) // 2] = cosine[side::2]
        return auroc_scores(s.latents, *sides)

    def _asked(self, s: Subjects) -> dict[str, Callable[[], Scores]]:
        j, asked = self.judging, self.asked
        some = s.some(self.most, j.seed)
        views = ItemViews(s.ev, s.modality)
        images = s.modality == IMAGE and s.ev.about["images"]
        shows = images or (s.modality == TEXT and s.ev.about["captions"])
        nothing, no_places = f"the evidence has no {s.modality}s to show", f"the site of {s.modality}s has no places"
        no_logs = f"{asked.name} is not known to give log-probabilities: name the scorer to have them asked for"
        can: dict[str, tuple[Callable[[], Scores], str]] = {
            "detection": (partial(asking.detection, some, asked, views, j.each, j.seed), "" if shows else nothing),
            "fuzzing": (partial(asking.fuzzing, some, asked, views, j.each, j.seed),
                        nothing if not shows else "" if views.places else no_places),
            "simulation_asked": (partial(simulated_by, some, asked, views, j.each, j.seed), "" if shows else nothing),
            "intruder_asked": (partial(asking.intruder, some, asked, views, j.set_size, min(6, j.trials), j.seed),
                               "" if shows else nothing),
            "pointing": (partial(asking.pointing, some, asked, views, j.each),
                         "the evidence has no images to point at" if not images else "" if views.places else no_places),
            "surprisal": (partial(surprisal, some, asked, j.each),
                          "the evidence has no captions" if not s.ev.about["captions"] else
                          "" if asked.client.scores or "surprisal" in j.scorers else no_logs),
        }  # fmt: skip
        if s.modality == TEXT and IMAGE in s.ev.modalities:  # images are pointed at elsewhere
            del can["pointing"]
        wanted = [n for n in can if _fits(n, s.control) and (not j.scorers or n in j.scorers)]
        return {n: can[n][0] for n in wanted if self._can(n, not can[n][1], can[n][1])}

    def _pushed_rows(self, s: Subjects) -> list[ScoreRows]:
        """Intervention scores of names and of what pushes suggest, of those of others, random directions, ablation."""
        out = []
        for (kind, control), found in self._pushed(s).items():
            if not (s.control and control):
                of = Subjects(s.ev, s.modality, s.names, control or s.control)
                out.append(ScoreRows.of(of, PUSHED + (f"_{kind}" if kind else ""), found))
        return out

    def _pushed(self, s: Subjects) -> dict[tuple[str, str], Scores]:
        from mmsae.hosts import pick_device
        from mmsae.hosts.protocols import Answers
        from mmsae.interpret.scores.intervention import LVLMSteerable, intervention

        host, j = NamedHost.of(s.ev).load(pick_device(self.device)), self.judging
        if not isinstance(host, Answers):
            raise InputError(f"scorer {PUSHED} needs a host that says something, and {host.hint} does not")
        s, views = s.some(self.most, j.seed), ItemViews(s.ev, IMAGE)
        items = np.random.default_rng(j.seed).permutation(np.unique(s.negative[s.negative >= 0]))
        images = [i for k in items[: 4 * j.each].tolist() if (i := views.image(k)) is not None][: 2 * j.each]
        if len(images) < 2:
            raise InputError(f"scorer {PUSHED} needs 2 images or more on which latents are silent, and {s.ev.folder} "
                             f"has {len(images)}")  # fmt: skip
        model = LVLMSteerable(
            host, self.saes[s.control].to(host.device), images, tuning=min(j.each, len(images) // 2), seed=j.seed
        )
        gains = intervention(model, self.asked, s.latents.tolist(), s.names.phrases, seed=j.seed)
        self.pushes += [{"control": s.control, **about} for about in gains.about]
        if missed := gains.missed():
            self._note(f"{PUSHED}{' of random weights' if s.control else ''}: {missed}")
        return gains.scores(j.seed)

    def run(self, say: Callable[[str], None] = lambda said: None) -> tuple[ScoreRows, dict[str, Any], list[Subjects]]:
        """All scores, what ``scores.json`` holds, and what was scored."""
        parts, subjects = [], self.subjects()
        for s in subjects:
            for name, score in self.scorers(s).items():
                say(f"{name}, {len(s.latents):,} latents by {s.modality}s{f', {s.control}' if s.control else ''}")
                parts.append(ScoreRows.of(s, name, score()))
            if PUSHED in self.judging.scorers and s.control in self.saes and s.modality == IMAGE:
                if self._can(f"{PUSHED} of random weights", self.saes[s.control] is not None, "no --control-sae"):
                    say(f"{PUSHED}, up to {self.most:,} latents{f', {s.control}' if s.control else ''}")
                    parts += self._pushed_rows(s)
        if not parts:
            why = "; ".join(f"{k}: {v}" for k, v in self.left_out.items())
            raise NothingToGoBy(
                f"nothing of {self.ev.folder} can be scored ({why}): name a client, or collect embeddings"
            )
        for r in parts:
            if np.isnan(r.value).all() and r.control[0] == "":
                why = " (see what the client answered)" if r.scorer[0] in ASKED else ""
                self._note(f"{r.scorer[0]}: none of {len(r.value):,} latents by {r.modality[0]}s has a score{why}")
        rows = ScoreRows.joined(parts)
        job = {
            "sae": self.ev.about["job"]["sae"], "host": self.ev.about["job"]["host"], **self.judging.__dict__,
            "control": self.control.about["job"]["sae"] if self.control else "", "half": "test",
        }  # fmt: skip
        found = {
            "job": job,
            "summary": summary(rows, self.judging.seed),
            "left_out": self.left_out,
            "notes": self.notes,
        }
        if self.pushes:
            found["pushes"] = self.pushes
        if self.asked:
            found["account"] = self.asked.account
        return rows, found, subjects


def write_scores(folder: Path, rows: ScoreRows, found: dict[str, Any]) -> Path:
    """Write ``scores.parquet`` and ``scores.json``; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.write(folder)
    return write_json(folder / SUMMARY, null_for_nan(found))

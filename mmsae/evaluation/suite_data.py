"""What the heads of a suite read: features of its sets through the SAE and its controls, truths, judges, prompts.

Everything is loaded when a head first asks for it, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.evaluation.features import Features, ImageChoice, load_features, token_site, with_sae
from mmsae.evaluation.images import HostPass, ImageChange, read_images
from mmsae.evaluation.labels import Classes, read_classes, read_templates
from mmsae.evaluation.ontology.tree import Tree
from mmsae.evaluation.options import PCA, RANDOM, EvaluationRun
from mmsae.evaluation.shifts import shift
from mmsae.evaluation.spaces import CONTROLS, Space, spaces
from mmsae.evaluation.suite import NotApplicable, Suite
from mmsae.evaluation.zeroshot.scores import class_embeddings
from mmsae.hosts import Encoder, Host, load_host
from mmsae.hosts.names import trusted
from mmsae.metrics.components import Components
from mmsae.sae import SAE, random_control
from mmsae.sae.random_control import needs_rows, without_rows
from mmsae.shards import FaultLog, draw, read_shards
from mmsae.types import IMAGE, TEXT, InputError

OOD_ROLES = ("ood", "near_ood", "val_ood")
QUICK_LIMIT = 1500  # images per set


class HeadResult(NamedTuple):
    """What a head returns."""

    rows: list[dict[str, Any]]  #: :func:`mmsae.evaluation.rows.row` each
    more: dict[str, Any] = {}  #: Further figures, for plots and results.json
    notes: Sequence[str] = ()  #: What a reader must know
    warnings: Sequence[str] = ()  #: What a reader must know before believing a figure; also printed


class SuiteData:
    """Features, truths and controls of a suite; the SAE is attached to the host, ``quick`` takes fewer images."""

    def __init__(
        self,
        suite: Suite,
        sae: SAE,
        host: Host,
        run: EvaluationRun = EvaluationRun(),
        quick: bool = False,
        seed: int = 0,
    ):
        self.suite, self.sae, self.host, self.run, self.quick, self.seed = suite, sae, host, run, quick, seed
        self._cache: dict[Any, Any] = {}
        self.warnings: list[str] = []  # about sets, as they are loaded

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def loaded(self, name: str) -> bool:
        """Whether a head has asked for a set."""
        return (name, IMAGE) in self._cache

    def named(self, *roles: str) -> list[str]:
        """The sets of these roles."""
        return [n for n, d in self.suite.data.items() if d.role in roles]

    def features(self, name: str, modality: str = IMAGE) -> Features:
        """Features of a set; classes are numbered as those of the training set.

        Raises:
            NotApplicable: The SAE has not this modality.
        """
        if modality not in self.sae.modalities:
            raise NotApplicable(f"the SAE has no {modality} side")
        return self._once((name, modality), lambda: self._load(name, modality))

    def token_site(self, modality: str = IMAGE) -> bool:
        """Whether the SAE reads tokens, which are not held: then its controls read them in the same pass."""
        return token_site(self.sae.sites[modality])

    def _load(self, name: str, modality: str) -> Features:
        d, suite = self.suite.data[name], self.suite
        low, high = d.part or (0.0, 1.0)
        relabel = self._relabel(name)  # then classes are numbered when they are translated, others as in training
        alike = name != "train" and relabel is None and d.role not in OOD_ROLES
        choice = ImageChoice(
            suite.label if d.label is None else d.label,
            classes=self.features("train").values if alike else None,
            exclude=d.exclude,
            limit=min(d.limit or QUICK_LIMIT, QUICK_LIMIT) if self.quick else d.limit,
            keep=None if d.part is None else lambda uid: low <= draw(uid, 1) < high,
        )
        change = ImageChange(shift(d.change), str(d.change)) if d.change and modality == IMAGE else None
        features = self.load(self.suite.paths(name), choice, name, change, modality)
        if d.unlabelled:
            features = features.rows(features.labels < 0)
        return features if relabel is None else self._relabelled(name, features, relabel)

    def load(
        self,
        shards: Sequence[str],
        choice: ImageChoice,
        name: str,
        change: ImageChange | None = None,
        modality: str = IMAGE,
    ) -> Features:
        """:func:`load_features` with what else reads the tokens of a set."""
        return load_features(self.host, self.sae, shards, choice, self.run, change=change, modality=modality,
                             desc=name, **self._controls(name, modality))  # fmt: skip

    def _relabel(self, name: str) -> dict[str, Any] | str | None:
        """How the labels of a set become classes: as it says, else (but for OOD sets) as the training set says."""
        d = self.suite.data[name]
        own = d.relabel is not None or d.unlabelled or d.role in OOD_ROLES
        return d.relabel if own else self.suite.data["train"].relabel

    def _controls(self, name: str, modality: str = IMAGE) -> dict[str, Any]:
        """What else reads the tokens of a set: random weights, and the components of the training tokens on others."""
        if not self.token_site(modality):
            return {}
        if name == "train":
            return {"others": {RANDOM: self.random}, "moments": True}
        return {"others": {RANDOM: self.random, PCA: self.components(modality)}}

    def components(self, modality: str = IMAGE) -> Components:
        """The leading principal components of the training rows, as many as the code has active latents per row."""
        train = self.features("train", modality)
        make = lambda: Components.leading(train.x if train.moments is None else train.moments, train.l0)  # noqa: E731
        return self._once(("components", modality), make)

    def _relabelled(self, name: str, f: Features, relabel: dict[str, Any] | str) -> Features:
        """A set of other labels, in the classes of the training set, which for that set are all that occur."""
        if isinstance(relabel, str):
            said = self.field(name, relabel)
            new = [said.get(u) for u in f.uids]
        else:
            to = [relabel.get(v, relabel.get(str(v))) for v in f.values]
            new = [to[c] if c >= 0 else None for c in f.labels.tolist()]
        if name == "train":
            names = values = sorted({str(v) for v in new if v is not None})
        else:
            train = self.features("train")
            names, values = train.names, train.values
        number = {str(v): i for i, v in enumerate(values)} | {n: i for i, n in enumerate(names)}
        labels = torch.tensor([number.get(str(v), -1) for v in new])
        at = f"{self.suite.path}: data.{name}.relabel"
        if self.suite.data[name].relabel is None:
            at = f"{self.suite.path}: data.train.relabel, used for {name},"
        if not (labels >= 0).any():
            raise InputError(f"{at} gives none of {f.n} images a class of training")
        if lost := int((labels < 0).sum()):
            self.warnings.append(f"{at} gives {lost} of the {f.n} images no class of training: they are left out")
        return f._replace(labels=labels, names=names, values=values).rows(labels >= 0)

    def labelled(self, name: str) -> Features:
        """The images of a set that have a class.

        Raises:
            NotApplicable: There are fewer than two classes.
        """
        f = self.features(name)
        f = f.rows(f.labels >= 0)
        if len(f.labels.unique()) < 2:
            raise NotApplicable(f"{name} has images of {len(f.labels.unique())} classes, two are needed")
        return f

    @cached_property
    def random(self) -> SAE:
        """The SAE with random weights, as sparse on the training set where its rows are held."""
        rows = {}
        for m in self.sae.modalities if needs_rows(self.sae) else ():
            if not self.token_site(m):
                with suppress(NotApplicable, InputError):  # a set without captions is nobody's fault here
                    rows[m] = self.features("train", m).x
        if not rows:
            self.warnings += without_rows(self.sae)
        return random_control(self.sae, self.seed, rows)

    def control(self, name: str, modality: str = IMAGE, control: str = RANDOM) -> Features:
        """A set through a control: the SAE with random weights, or (any set but the training set) components."""

        def make() -> Features:
            f = self.features(name, modality)
            if self.token_site(modality):
                return f.through(f.others[control])
            return with_sae(f, self.random if control == RANDOM else self.components(modality), modality)

        return self._once((name, modality, control), make)

    def spaces(self, sets: Sequence[Features], controls: Sequence[str] = CONTROLS, **kwargs: Any) -> list[Space]:
        """:func:`mmsae.evaluation.spaces.spaces` with the suite's SAE and seed."""
        return spaces(sets, self.sae, controls=controls, seed=self.seed, **kwargs)

    def field(self, name: str, field: str) -> dict[str, Any]:
        """``{uid: value}`` of a json field of a set."""

        def read() -> dict[str, Any]:
            samples = read_shards(self.suite.paths(name), FaultLog(), need=(), decode=False)
            found = {s.uid: s.meta.get(field) for s in samples}
            if all(v is None for v in found.values()):
                raise InputError(f"no sample of {self.suite.paths(name)[0]} has json field {field!r}")
            return found

        return self._once((tuple(self.suite.paths(name)), field), read)

    def truth(self, name: str, uids: Sequence[str], source: str) -> tuple[Tensor, list[str]]:
        """``(n, C)`` bool concepts of images of a set, from ``json:FIELD`` (a list, or one value), and their names."""
        field = source.removeprefix("json:")
        sets = {n: self.field(n, field) for n in dict.fromkeys(("train", name))}

        def listed(value: Any) -> list[str]:
            return [] if value is None else [str(v) for v in value] if isinstance(value, list) else [str(value)]

        names = sorted({v for values in sets.values() for value in values.values() for v in listed(value)})
        number = {v: i for i, v in enumerate(names)}
        out = torch.zeros(len(uids), len(names), dtype=torch.bool)
        for i, u in enumerate(uids):
            out[i, [number[v] for v in listed(sets[name][u])]] = True
        return out, names

    def concepts(self, name: str) -> tuple[Features, Tensor, list[str]]:
        """Images of a set, ``(n, C)`` bool of what is true of them, and the C names."""
        if self.suite.concepts:
            f = self.features(name)
            truth, names = self.truth(name, f.uids, self.suite.concepts)
            return f, truth, names
        f = self.labelled(name)
        return f, torch.nn.functional.one_hot(f.labels, len(f.names)).bool(), f.names

    def judge(self, name: str) -> tuple[Tensor, str]:
        """``(n, e)`` embeddings of a set by the suite's judge, unit rows, and what the judge is."""
        judge = self.suite.judge
        f = self.features(name)

        def make() -> tuple[Tensor, str]:
            if judge == "host":
                return normalize(f.x, dim=1), "the SAE's own host (circular)"
            if judge.startswith("json:"):
                truth, _ = self.truth(name, f.uids, judge)
                return normalize(truth.float(), dim=1), f"{judge.removeprefix('json:')} in the data"
            return normalize(self._by_other_host(name, judge), dim=1), judge

        return self._once((name, "judge"), make)

    def _by_other_host(self, name: str, judge: str) -> Tensor:
        host = load_host(trusted(judge, str(self.suite.path)), device=str(self.host.device))
        uids = self.features(name).uids
        if host.fingerprint == self.host.fingerprint:
            raise InputError(f"{self.suite.path}: the judge {judge} is the SAE's own host; say judge: host")
        size = self.host.batch_size(self.run.batch_size)
        asked = HostPass(host, host.site("image.embed"), run=replace(self.run, batch_size=size, fault_limit=1.0))
        found = read_images(asked, self.suite.paths(name), set(uids), f"{name} by {judge}")
        row = {u: x for rows in found for u, x in zip(rows.uids, rows.x, strict=True)}
        return torch.stack([row[u] for u in uids])

    @cached_property
    def classes(self) -> Classes:
        """Class names and values: those of the suite's file, else those of the training set."""
        train = self.features("train")
        if self.suite.classes:
            names = read_classes(self.suite.find(self.suite.classes))
            by_value = dict(zip(map(str, names.values), names.names, strict=True))
            return Classes(
                [by_value.get(str(v), n) for v, n in zip(train.values, train.names, strict=True)], train.values
            )
        return Classes(train.names, train.values)

    @cached_property
    def prompts(self) -> Tensor:
        """``(C, d)`` class embeddings by the host.

        Raises:
            NotApplicable: The host has no text, or its images are not read where text is compared with them.
        """
        if not isinstance(self.host, Encoder) or TEXT not in self.host.modalities:
            raise NotApplicable("the host encodes no text")
        if self.sae.sites[IMAGE].module != "image.embed":
            raise NotApplicable(f"images are read at {self.sae.sites[IMAGE].module}, where no text can be compared")
        source = self.suite.templates
        templates = read_templates(source if source in ("simple", "openai") else self.suite.find(source))

        def embed(texts: list[str]) -> Tensor:
            return self.host.encode_text(self.host.tokenize(texts)).cpu()

        found = class_embeddings(embed, self.classes.names, templates)
        if torch.allclose(found, found[:1].expand_as(found)):
            named = ", ".join(self.classes.names[:3])
            raise NotApplicable(f"the host knows no word of the class names ({named}, ...): all prompts are alike")
        return found

    def tree(self, name: str) -> Tree:
        """A tree of the suite over the classes of the training set."""
        source = self.suite.trees[name]
        source = source if source == "wordnet" else self.suite.find(source)
        return self._once(("tree", name), lambda: Tree.named(source, self.features("train").values))

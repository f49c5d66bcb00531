"""The sets of an OOD evaluation: ID images split by their uid, OOD sets by name, and what they must not share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import Features, ImageChoice, load_features
from mmsae.evaluation.images import ImageChange
from mmsae.evaluation.labels import plain, read_lines
from mmsae.evaluation.ood.head import ID
from mmsae.evaluation.options import EvaluationRun, Labelled, OODSets
from mmsae.hosts import Host
from mmsae.sae import SAE
from mmsae.shards import draw
from mmsae.types import InputError

SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}
GRID = 4  # an image is cut into GRID x GRID pieces to scramble it


class OODShards(NamedTuple):
    """Shards of an evaluation."""

    id: Any  #: ID shards: all of them, or where ``beside.train`` is given those of the test
    ood: Mapping[str, Any]  #: ``{name: shards}``
    val: Mapping[str, Any] = {}  #: OOD validation shards by name; empty: made from ID validation images
    beside: OODSets = OODSets()  #: Options of further sets
    images: Labelled = Labelled()  #: Labels and limit
    classes: Sequence[Any] | None = None  #: Label values, if not those that occur


class OODFeatures(NamedTuple):
    """Features of all sets."""

    train: Features  #: ID images to fit on
    val: Features  #: ID images to choose on
    test: Features  #: ID images to score
    val_ood: Features  #: The OOD validation set
    ood: dict[str, Features]  #: ``{name: features}``
    notes: list[str]  #: What was left out
    val_ood_is: str  #: What the OOD validation set is

    def by_name(self) -> dict[str, Features]:
        """``{train, val, val_ood, id, ...: features}``."""
        return {"train": self.train, "val": self.val, "val_ood": self.val_ood, ID: self.test, **self.ood}


def named_shards(arguments: Sequence[str], flag: str) -> dict[str, str]:
    """``{name: shards}`` of arguments like ``NAME=SHARDS``.

    Raises:
        InputError: No ``=``, a name twice, or one that means something else.
    """
    out: dict[str, str] = {}
    for argument in arguments:
        name, sep, shards = argument.partition("=")
        if not sep or not name or not shards:
            raise InputError(f"{flag} {argument!r} is not NAME=SHARDS")
        if name in out or name in (ID, "near", "far", "train", "val", "val_ood"):
            raise InputError(f"{flag} names {name!r} twice" if name in out else f"{flag} {name!r}: choose another name")
        out[name] = shards
    return out


def split_of(uid: str, parts: Sequence[str]) -> str:
    """Which of some parts (keys of :data:`SHARES`) a sample belongs to, by a hash of its uid."""
    at = draw(uid, 5) * sum(SHARES[p] for p in parts)
    for p in parts:
        at -= SHARES[p]
        if at < 0:
            return p
    return parts[-1]


def load_sets(
    host: Host,
    sae: SAE,
    shards: OODShards,
    run: EvaluationRun = EvaluationRun(),
    *,
    embed: bool = False,
    pool: str = "max",
    others: Mapping[str, Any] = {},
) -> OODFeatures:
    """Run host and SAE over all shards; for ``embed``, ``pool`` and ``others`` see :func:`load_features`.

    Raises:
        InputError: Fewer than two training images, or none of a set; ``val`` or ``fit_limit`` without ``train``.
    """
    beside, limit = shards.beside, shards.images.limit
    label, fit_limit = shards.images.label, limit if beside.fit_limit is None else beside.fit_limit
    if not beside.train and (beside.val or beside.fit_limit is not None):
        raise InputError(f"{'--val' if beside.val else '--fit-limit'} goes with training shards: give --train")

    def load(source: Any, which: ImageChoice, desc: str, change: ImageChange | None = None) -> Features:
        return load_features(host, sae, source, which, run, change=change, embed=embed, pool=pool, others=others,
                             desc=desc)  # fmt: skip

    fit_parts = ["train", *([] if beside.val else ["val"]), *([] if beside.train else ["test"])]
    whole = load(beside.train or shards.id, ImageChoice(label, classes=shards.classes, limit=fit_limit), ID)
    parts = {p: torch.tensor([split_of(u, fit_parts) == p for u in whole.uids]) for p in fit_parts}
    if empty := [p for p, at in parts.items() if not at.any()]:
        raise InputError(f"the {whole.n} ID images leave none for {empty[0]}; give more, or --train")
    split = {p: whole.rows(at) for p, at in parts.items()}
    if beside.train:
        split["test"] = load(shards.id, ImageChoice(label, classes=whole.values, limit=limit), "id test")
    if beside.val:
        split["val"] = load(beside.val, ImageChoice(label, classes=whole.values, limit=fit_limit), "id validation")
    split, notes = _compact(split, whole, label)
    exclude = read_lines(beside.exclude) if beside.exclude else ()
    outside = ImageChoice(beside.ood_label or label, labelled=False, exclude=exclude, limit=limit)
    ood = {name: load(source, outside, name) for name, source in shards.ood.items()}
    if shards.val:
        (name, source), *more = shards.val.items()
        if more:
            raise InputError(f"--ood-val has {1 + len(more)} sets, one is used: give its shards as one pattern")
        val_ood, said = load(source, ImageChoice("", limit=limit), name), f"the set {name}"
    else:
        own = ImageChoice("", keep=set(split["val"].uids).__contains__)
        source = beside.val or beside.train or shards.id
        val_ood = load(source, own, "ood validation", ImageChange(generated, "generated"))
        said = f"generated from the {val_ood.n} ID validation images: half scrambled pieces, half noise of equal colour"
    return OODFeatures(split["train"], split["val"], split["test"], val_ood, ood, notes, said)


def _compact(split: dict[str, Features], whole: Features, label: str) -> tuple[dict[str, Features], list[str]]:
    """The same sets with the classes that have training images, numbered without gaps; others are left out, said so."""
    if not label:
        split = {p: f._replace(labels=torch.zeros(f.n, dtype=torch.long), names=["id"]) for p, f in split.items()}
        return split, []
    notes = []
    present = split["train"].labels.clamp(min=-1).unique()
    present = present[present >= 0]
    if not len(present):
        raise InputError(f"none of the {split['train'].n} ID training images has a label in {label!r} that is a class")
    new = torch.full((len(whole.names) + 1,), -1)
    new[present] = torch.arange(len(present))
    missing = [whole.names[i] for i in range(len(whole.names)) if new[i] < 0]
    if missing:
        notes.append(f"classes without training images are left out: {', '.join(missing[:10])}")
    out = {}
    for p, f in split.items():
        labels = new[f.labels]  # -1 takes the last entry, which is -1
        if gone := int((labels < 0).sum()):
            notes.append(f"{gone} of {f.n} ID {p} images have no class with training images and are left out")
        if gone == f.n:
            raise InputError(f"none of the {f.n} ID {p} images is of a class that has training images")
        names, values = ([column[i] for i in present.tolist()] for column in (f.names, f.values))
        out[p] = f._replace(labels=labels, names=names, values=values).rows(labels >= 0)
    return out, notes


def shared_classes(train: Features, ood: Mapping[str, Features]) -> dict[str, list[str]]:
    """``{OOD set: class names that the ID set has, too}``; names that are bare numbers do not count."""
    named = {plain(n) for n in (*train.names, *train.said)}
    named = {n for n in named if n and not n.lstrip("-").isdigit()}
    found = {name: sorted(n for n in f.said if plain(n) in named) for name, f in ood.items()}
    return {name: shared for name, shared in found.items() if shared}


def set_warnings(sets: OODFeatures, named_validation: bool) -> list[str]:
    """Warnings about sets that share classes or images with those that detectors are fitted and chosen on."""
    out = [
        f"OOD set {name} has classes of the ID set: {', '.join(shared[:10])}; --exclude FILE leaves them out"
        for name, shared in shared_classes(sets.train, sets.ood).items()
    ] + shared_images("ID test", sets.test, sets.train.uids + sets.val.uids, "training or validation")
    if named_validation:
        out += [w for n, f in sets.ood.items() for w in shared_images(n, f, sets.val_ood.uids, "OOD validation")]
    return out


def shared_images(name: str, test: Features, seen: Sequence[str], what: str) -> list[str]:
    """A warning where images of a test set are among those that were seen before."""
    same = len(set(test.uids) & set(seen))
    why = "equal uids: one image in both, or tars of one name whose keys repeat"
    return [f"{same} of the {test.n} {name} images are {what} images, too ({why})"] if same else []


def generated(images: Tensor) -> Tensor:
    """OOD images made of ID ones ``(B, 3, H, W)``: even rows scrambled in pieces, odd rows noise of the same colours.

    Deterministic: the draw is seeded with the batch's shape.
    """
    g = torch.Generator().manual_seed(images.shape[0])
    out = images.clone()
    if len(odd := images[1::2]):
        mean, std = odd.mean((2, 3), keepdim=True), odd.std((2, 3), keepdim=True)
        out[1::2] = mean + std * torch.randn(odd.shape, generator=g)
    h, w = (n // GRID * GRID for n in images.shape[2:])
    even = images[::2, :, :h, :w]
    pieces = even.unflatten(3, (GRID, -1)).unflatten(2, (GRID, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(len(even), GRID * GRID, generator=g).argsort(1)
    pieces = pieces[torch.arange(len(even))[:, None], order].unflatten(1, (GRID, GRID))
    out[::2, :, :h, :w] = pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return out

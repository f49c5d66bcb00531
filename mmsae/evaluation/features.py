"""What every head reads: one row per image of raw activations, codes, reconstruction and residual, with its label.

Images are streamed, their features are held: ``(n, d)`` per kind, codes sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.images import HostPass, ImageChange, ImageRows, read_images
from mmsae.evaluation.labels import Labels, read_labels
from mmsae.evaluation.options import EvaluationRun
from mmsae.evaluation.pooling import TINY, Sums, Through, TokenMeans, mean_rows, pool_codes
from mmsae.hosts import Host
from mmsae.metrics.components import Components, Moments
from mmsae.sae import SAE
from mmsae.shards import draw, expand
from mmsae.types import IMAGE, Codes, InputError, Site

POOLS = ("max", "mean")


class Features(NamedTuple):
    """Features of n images."""

    x: Tensor  #: ``(n, d)`` raw activations (token sites: mean over the image's tokens)
    z: Codes  #: See :class:`Through`
    recon: Tensor  #: See :class:`Through`
    labels: Tensor  #: ``(n,)`` int64 classes, -1 where an image has none (or one that was not asked for)
    names: list[str]  #: Class names by number
    uids: list[str]  #: The n sample ids
    sums: Sums  #: See :class:`Through`
    values: list[Any] = []  #: Label values by class number; ``ImageChoice(classes=other.values)`` numbers alike
    #: ``(n, s)`` plain statistics of the image as the host sees it (:class:`ImageRows`), or None.
    stats: Tensor | None = None
    embed: Tensor | None = None  #: ``(n, e)`` the host's own image embeddings where asked for, or None
    pool: str = "one"  #: How the tokens of an image became one row of codes: ``one`` (pooled site), ``max`` or ``mean``
    said: dict[str, int] = {}  #: ``{name of the class as the data says: images}``, labels asked for or not
    tokens: TokenMeans | None = None  #: See :class:`Through`
    others: Mapping[str, Through] = {}  #: The same images through other SAEs, by name
    moments: Moments | None = None  #: Moments of all rows that were read, where asked for

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.x)

    @property
    def resid(self) -> Tensor:
        """``(n, d)`` ``x - recon``, made when it is asked for."""
        return self.x - self.recon

    @property
    def error(self) -> Tensor:
        """``(n,)`` relative error ``|x - recon|^2 / |x|^2``, over all tokens of the image."""
        return self.sums.error / self.sums.square.clamp(min=TINY)

    @property
    def l0(self) -> float:
        """Mean number of latents that fire per row: per image, at token sites per token."""
        return float(self.sums.active.sum() / self.sums.rows.sum())

    @property
    def fvu(self) -> float:
        """Share of the variance of all rows that reconstructions miss: of images, at token sites of tokens."""
        return float(self.sums.error.sum() / self.sums.spread(self.x).sum())

    def through(self, other: Through) -> Features:
        """The same images through another SAE."""
        return self._replace(**other._asdict())

    def rows(self, which: Tensor) -> Features:
        """The features of some images (bool mask or indices ``(m,)``)."""
        at = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        picked = {f: None if (t := getattr(self, f)) is None else t[at] for f in ("stats", "embed")}
        own = Through(self.z, self.recon, self.sums, self.tokens).rows(at)
        return self._replace(
            x=self.x[at], labels=self.labels[at], uids=[self.uids[i] for i in at.tolist()],
            others={k: o.rows(at) for k, o in self.others.items()}, **own._asdict(), **picked,
        )  # fmt: skip


def token_site(site: Site) -> bool:
    """Whether an image has many rows at a site, which are not held; else it has one."""
    return site.tokens not in ("pooled", "cls", "eos")


def encode_features(
    sae: SAE,
    x: Tensor,
    labels: Tensor | None = None,
    names: Sequence[str] = (),
    uids: Sequence[str] | None = None,
    *,
    modality: str = IMAGE,
    chunk: int = 8192,
    **more: Any,
) -> Features:
    """Features of activations that are in memory: ``x (n, d)`` of a pooled site."""
    parts = [_encode(sae, part, modality) for part in x.split(chunk)]
    z, recon = Codes.stack([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    x = x.float().cpu()
    n = len(x)
    sums = Sums.of(x, recon, z, torch.arange(n), n)
    return Features(
        x, z, recon, torch.full((n,), -1) if labels is None else labels, list(names),
        [f"{i:032x}" for i in range(n)] if uids is None else list(uids), sums, **more,
    )  # fmt: skip


def with_sae(features: Features, sae: SAE, modality: str = IMAGE) -> Features:
    """The same images through another SAE, a control for example.

    Raises:
        InputError: Token sites: the tokens are not held, load the features again with the other SAE.
    """
    if features.pool != "one":
        raise InputError("features of a token site cannot be encoded again: load them with the other SAE")
    new = encode_features(sae, features.x, modality=modality)
    return features.through(Through(new.z, new.recon, new.sums))


@dataclass(frozen=True)
class ImageChoice:
    """Which images, and how their labels become classes."""

    label: str = "cls"  #: ``cls``, or a field of the samples' json; empty: no labels
    labelled: bool = True  #: Whether some image must have a label
    #: Label values in the order of their numbers; default: those that occur, sorted. Others get -1.
    classes: Sequence[Any] | None = None
    #: Images whose label value or class name is among these are left out.
    exclude: Sequence[str] = ()
    limit: int | None = None  #: At most so many images, chosen by a hash of their uid
    keep: Callable[[str], bool] | None = None  #: Only images whose uid it is true of


def load_features(
    host: Host,
    sae: SAE,
    shards: str | Sequence[str],
    choice: ImageChoice = ImageChoice(),
    run: EvaluationRun = EvaluationRun(),
    *,
    change: ImageChange | None = None,
    embed: bool = False,
    pool: str = "max",
    others: Mapping[str, SAE | Components] = {},
    moments: bool = False,
    modality: str = IMAGE,
    desc: str = "features",
) -> Features:
    """Run a host and an SAE over image shards (path, folder, glob or brace pattern, or several).

    The SAE is of one of the host's image sites, ``image.pooled`` too, and attached (:meth:`SAE.attach`). ``run`` says
    where what the host gives is kept (:mod:`mmsae.evaluation.images`); ``embed`` keeps its image embeddings as well. At
    token sites ``pool`` (``max`` or ``mean``) over an image's tokens makes its code. Tokens are not held: what is to be
    known of them through ``others`` (:attr:`Features.others`) or of their ``moments`` is computed in this pass.

    Raises:
        InputError: No image is left, too many are unusable, no such label field, or an unknown ``pool``.
    """
    if pool not in POOLS:
        raise InputError(f"pool is {pool!r}, it must be one of {', '.join(POOLS)}")
    paths = expand(shards)
    known = read_labels(paths, choice.label, choice.labelled).without(choice.exclude)
    wanted = {u for u in known.value if choice.keep is None or choice.keep(u)}
    if choice.limit is not None and len(wanted) > choice.limit:
        wanted = set(sorted(wanted, key=draw)[: choice.limit])
    asked = HostPass(host, sae.sites[modality], modality, embed, change, run)
    rows = _Rows({**others, "": sae}, asked, pool, Moments() if moments else None)
    for got in read_images(asked, paths, wanted, desc):
        rows.add(got)
    if not rows.uids:
        raise InputError(f"{paths[0]} and {len(paths) - 1} other shards have no image that is usable and asked for")
    return rows.features(known, choice.classes, wanted)


class _Rows:
    """Collects the rows of a stream."""

    def __init__(self, saes: Mapping[str, SAE], asked: HostPass, pool: str, moments: Moments | None):
        self.saes, self.device, self.modality, self.pool = saes, asked.host.device, asked.modality, pool
        self.moments, self.uids = moments, []
        self.token_site = token_site(asked.site)
        self.parts: dict[str, list] = {k: [] for k in ("x", "stats", "embed")}
        self.through: dict[str, list[Through]] = {name: [] for name in saes}

    @torch.no_grad()
    def add(self, got: ImageRows) -> None:
        """Add what the host gave for some images."""
        x, item, n = got.x, got.item, len(got.uids)
        rows = x.to(self.device)
        if self.token_site:  # controls have the SAE's normaliser
            inner = mean_rows(self.saes[""].normaliser(rows, self.modality)[0].cpu(), item, n)
        for name, sae in self.saes.items():
            z, recon = _encode(sae, rows, self.modality)
            sums, means = Sums.of(x, recon, z, item, n), None
            if self.token_site:
                z, mean, fires = pool_codes(z, item, n, self.pool)
                recon, means = mean_rows(recon, item, n), TokenMeans(inner, mean, fires)
            self.through[name].append(Through(z, recon, sums, means))
        if self.moments is not None:
            self.moments.add(x)
        self.parts["x"].append(mean_rows(x, item, n) if self.token_site else x)
        for name in ("stats", "embed"):
            if (value := getattr(got, name)) is not None:
                self.parts[name].append(value)
        self.uids += got.uids

    def features(self, known: Labels, classes: Sequence[Any] | None, wanted: set[str]) -> Features:
        """Everything that is wanted as one (batches of texts and of vision-language hosts came whole)."""
        x, stats, embed = (torch.cat(self.parts[k]) if self.parts[k] else None for k in ("x", "stats", "embed"))
        others = {name: Through.stack(parts) for name, parts in self.through.items()}
        own = others.pop("")
        keep = torch.tensor([u in wanted for u in self.uids])
        uids = [u for u in self.uids if u in wanted]
        values = known.values_of(uids) if classes is None else list(classes)
        pool = self.pool if self.token_site else "one"
        f = Features(
            x, own.z, own.recon, known.numbers(self.uids, values), [known.name_of(v) for v in values],
            self.uids, own.sums, values, stats, embed, pool, known.said(uids), own.tokens, others, self.moments,
        )  # fmt: skip
        return f if keep.all() else f.rows(keep)


def _encode(sae: SAE, x: Tensor, modality: str) -> tuple[Codes, Tensor]:
    with torch.no_grad():
        z = sae.encode(x, modality)
        recon = sae.decode(z, modality).float().cpu()
    return z._replace(values=z.values.cpu(), indices=None if z.indices is None else z.indices.cpu(), info=None), recon

"""What every head reads: one row per image of raw activations, codes, reconstruction and residual, with its label.

Images are streamed, their features are held: ``(n, d)`` per kind, codes sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mmsae.backbones import Backbone
from mmsae.heads.labels import Labels, read_labels
from mmsae.sae import SAE
from mmsae.shards import FAULT_LIMIT, FaultLog, expand, unit_batches
from mmsae.tasks.selection import draw
from mmsae.types import IMAGE, Codes, ImageTextBatch, InputError

KINDS = ("raw", "code", "recon", "resid")
POOLS = ("max", "mean")
TINY = 1e-12


class Features(NamedTuple):
    """Features of n images.

    Attributes:
        x: ``(n, d)`` raw activations (token sites: mean over the image's tokens).
        z: Codes of n rows (token sites: largest or mean value over the tokens, see ``pool``).
        recon: ``(n, d)`` reconstructions in the units of x.
        resid: ``(n, d)`` ``x - recon``.
        labels: ``(n,)`` int64 classes, -1 where an image has none (or one that was not asked for).
        names: Class names by number.
        uids: The n sample ids.
        error: ``(n,)`` relative error ``|x - recon|^2 / |x|^2``, over all tokens of the image.
        values: Label values by class number; ``load_features(classes=other.values)`` numbers alike.
        stats: ``(n, s)`` plain statistics of the picture as the host sees it, or None (:func:`image_statistics`).
        embed: ``(n, e)`` the host's own image embeddings where asked for, or None.
        pool: How the tokens of an image became one row of codes: ``one`` (pooled site), ``max`` or ``mean``.
        said: ``{name of the class as the data says: images}``, labels asked for or not.
    """

    x: Tensor
    z: Codes
    recon: Tensor
    resid: Tensor
    labels: Tensor
    names: list[str]
    uids: list[str]
    error: Tensor
    values: list[Any] = []
    stats: Tensor | None = None
    embed: Tensor | None = None
    pool: str = "one"
    said: dict[str, int] = {}

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.x)

    def rows(self, which: Tensor) -> Features:
        """The features of some images (bool mask or indices ``(m,)``)."""
        at = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        picked = {f: None if (t := getattr(self, f)) is None else t[at] for f in ("stats", "embed")}
        return self._replace(
            x=self.x[at], z=self.z.rows(at), recon=self.recon[at], resid=self.resid[at], labels=self.labels[at],
            uids=[self.uids[i] for i in at.tolist()], error=self.error[at], **picked,
        )  # fmt: skip


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
    z, recon = stack_codes([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    x = x.float().cpu()
    n = len(x)
    return Features(
        x, z, recon, x - recon, torch.full((n,), -1) if labels is None else labels, list(names),
        [f"{i:032x}" for i in range(n)] if uids is None else list(uids), _error(x, recon, torch.arange(n), n), **more,
    )  # fmt: skip


def with_sae(features: Features, sae: SAE, modality: str = IMAGE) -> Features:
    """The same images through another SAE, a control for example.

    Raises:
        InputError: Token sites: the tokens are not held, load the features again with the other SAE.
    """
    if features.pool != "one":
        raise InputError("features of a token site cannot be encoded again: load them with the other SAE")
    new = encode_features(sae, features.x, modality=modality)
    return features._replace(z=new.z, recon=new.recon, resid=new.resid, error=new.error)


def load_features(
    host: Backbone,
    sae: SAE,
    shards: str | Sequence[str],
    *,
    label: str = "cls",
    labelled: bool = True,
    classes: Sequence[Any] | None = None,
    exclude: Sequence[str] = (),
    limit: int | None = None,
    keep: Callable[[str], bool] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
    embed: bool = False,
    pool: str = "max",
    modality: str = IMAGE,
    batch_size: int = 256,
    workers: int = 0,
    fault_limit: float = FAULT_LIMIT,
    progress: bool = True,
    desc: str = "features",
) -> Features:
    """Run a host and an SAE over image shards.

    Args:
        host: The frozen host.
        sae: An SAE of one of its sites (:meth:`SAE.attach` was called); any image site, ``image.pooled`` too.
        shards: Path, folder, glob or brace pattern, or several.
        label: ``cls``, or a field of the samples' json; empty: no labels.
        labelled: Whether some image must have a label.
        classes: Label values in the order of their numbers; default: those that occur, sorted. Others get -1.
        exclude: Images whose label value or class name is among these are left out.
        limit: At most so many images, chosen by a hash of their uid.
        keep: Only images whose uid it is true of.
        change: Applied to each batch of transformed images ``(B, 3, H, W)`` before the host sees them.
        embed: Whether to keep the host's image embeddings as well.
        pool: Token sites: ``max`` (default) or ``mean`` over an image's tokens makes its code.
        modality: Whose site.
        batch_size: Images per forward pass.
        workers: Decoding processes.
        fault_limit: Largest share of unusable samples.
        progress: Whether to show a bar.
        desc: Its name.

    Raises:
        InputError: No image is left, too many are unusable, no such label field, or an unknown ``pool``.
    """
    if pool not in POOLS:
        raise InputError(f"pool is {pool!r}, it must be one of {', '.join(POOLS)}")
    paths = expand(shards)
    known = read_labels(paths, label, labelled).without(exclude)
    wanted = {u for u in known.value if keep is None or keep(u)}
    if limit is not None and len(wanted) > limit:
        wanted = set(sorted(wanted, key=draw)[:limit])
    rows, log = _Rows(sae, host, modality, pool, embed), FaultLog()
    stream = unit_batches(paths, batch_size=batch_size, workers=workers, **host.reading({modality}))
    with closing(stream), tqdm(desc=desc, unit="image", disable=not progress) as bar:
        for unit in stream:
            log.merge(unit.batch.faults)
            if batch := _picked(unit.batch, wanted):
                if change is not None:
                    if batch.images is None:
                        raise InputError(f"host {host.hint} has no plain images to change: give shards instead")
                    batch = batch._replace(images=change(batch.images))
                rows.add(batch)
                bar.update(len(batch.uids))
            log.check(fault_limit)
    log.check(fault_limit, final=True)
    if not rows.uids:
        raise InputError(f"{paths[0]} and {len(paths) - 1} other shards have no image that is usable and asked for")
    return rows.features(known, classes, wanted)


def _picked(batch: ImageTextBatch, wanted: set[str]) -> ImageTextBatch | None:
    """The samples that are asked for; hosts with inputs of their own get whole batches (rows are chosen later)."""
    at = [i for i, u in enumerate(batch.uids) if u in wanted]
    if not at or batch.images is None or len(at) == len(batch.uids):
        return batch if at else None
    return batch._replace(images=batch.images[at], uids=[batch.uids[i] for i in at])


class _Rows:
    """Collects the rows of a stream."""

    def __init__(self, sae: SAE, host: Backbone, modality: str, pool: str, embed: bool):
        self.sae, self.host, self.modality, self.pool, self.uids = sae, host, modality, pool, []
        self.sites = [sae.sites[modality], *(["image.embed"] if embed else [])]
        self.token_site = sae.sites[modality].tokens not in ("pooled", "cls", "eos")
        self.parts: dict[str, list] = {k: [] for k in ("x", "z", "recon", "error", "stats", "embed")}

    @torch.no_grad()
    def add(self, batch: ImageTextBatch) -> None:
        """Add the images of a batch."""
        got = self.host.read(batch, self.sites)
        x, item, n = got[0].x, got[0].item, len(batch.uids)
        z, recon = _encode(self.sae, x, self.modality)
        x, item = x.cpu(), item.cpu()
        p = self.parts
        p["error"].append(_error(x, recon, item, n))
        if self.token_site:
            z, x, recon = pool_codes(z, item, n, self.pool), _mean(x, item, n), _mean(recon, item, n)
        p["x"].append(x), p["z"].append(z), p["recon"].append(recon)
        if batch.images is not None:
            p["stats"].append(image_statistics(batch.images))
        if len(got) > 1:
            p["embed"].append(got[1].x.cpu())
        self.uids += batch.uids

    def features(self, known: Labels, classes: Sequence[Any] | None, wanted: set[str]) -> Features:
        """Everything that is wanted as one (batches of texts and of vision-language hosts came whole)."""
        x, recon, error = (torch.cat(self.parts[k]) for k in ("x", "recon", "error"))
        stats, embed = (torch.cat(self.parts[k]) if self.parts[k] else None for k in ("stats", "embed"))
        keep = torch.tensor([u in wanted for u in self.uids])
        uids = [u for u in self.uids if u in wanted]
        values = known.values_of(uids) if classes is None else list(classes)
        pool = self.pool if self.token_site else "one"
        f = Features(
            x, stack_codes(self.parts["z"]), recon, x - recon, known.numbers(self.uids, values),
            [known.name_of(v) for v in values], self.uids, error, values, stats, embed, pool, known.said(uids),
        )  # fmt: skip
        return f if keep.all() else f.rows(keep)


def _encode(sae: SAE, x: Tensor, modality: str) -> tuple[Codes, Tensor]:
    with torch.no_grad():
        z = sae.encode(x, modality)
        recon = sae.decode(z, modality).float().cpu()
    return z._replace(values=z.values.cpu(), indices=None if z.indices is None else z.indices.cpu(), info=None), recon


def _error(x: Tensor, recon: Tensor, item: Tensor, n: int) -> Tensor:
    """``(n,)`` squared error over squared norm, both summed over the rows of an item."""
    total = torch.zeros(2, n, dtype=torch.float64)
    for row, t in zip(total, (x - recon, x), strict=True):
        row.index_add_(0, item, t.double().square().sum(1))
    return total[0] / total[1].clamp(min=TINY)


def _mean(x: Tensor, item: Tensor, n: int) -> Tensor:
    count = torch.bincount(item, minlength=n).clamp(min=1).to(x)
    return x.new_zeros(n, x.shape[1]).index_add_(0, item, x) / count[:, None]


def pool_codes(z: Codes, item: Tensor, n: int, pool: str = "max") -> Codes:
    """Codes of n items from those of their tokens: ``max`` or ``mean`` over the tokens ``item (N,)`` of each."""
    if pool == "mean":
        dense = z.pool(item, n)
    else:
        rows = z.to_dense() if z.indices is None else z.values
        at = item[:, None].expand_as(rows)
        dense = rows.new_zeros(n * z.d_sae)
        latent = torch.arange(z.d_sae).expand_as(rows) if z.indices is None else z.indices
        dense = dense.scatter_reduce_(0, (at * z.d_sae + latent).flatten(), rows.flatten(), "amax").view(n, z.d_sae)
    k = max(1, int((dense != 0).sum(1).max()))
    values, indices = dense.topk(k, dim=1)
    return Codes(values, indices, z.d_sae, z.modality)


def stack_codes(parts: Sequence[Codes]) -> Codes:
    """Codes of several batches as one; rows with fewer entries are filled with zeros."""
    first = parts[0]
    if first.indices is None:
        return first._replace(values=torch.cat([p.values for p in parts]), info=None)
    k = max(p.values.shape[1] for p in parts)
    pad = torch.nn.functional.pad
    free = lambda p: _free_latents(p.indices, p.d_sae, k - p.indices.shape[1])  # noqa: E731
    values = torch.cat([pad(p.values, (0, k - p.values.shape[1])) for p in parts])
    indices = torch.cat([torch.cat([p.indices, free(p)], 1) for p in parts])
    return first._replace(values=values, indices=indices, info=None)


def _free_latents(indices: Tensor, d_sae: int, more: int) -> Tensor:
    """``(N, more)`` latents that a row does not have yet: a latent stands once in a row."""
    if not more:
        return indices[:, :0]
    taken = torch.zeros(len(indices), d_sae).scatter_(1, indices, 1.0)
    return taken.topk(more, dim=1, largest=False).indices


def image_statistics(images: Tensor) -> Tensor:
    """``(B, 8)`` of images ``(B, 3, H, W)``: mean and spread of each channel, mean step between neighbours both ways.

    What a trivial detector sees: brightness, contrast, colour, and sharpness (which tells resolution and JPEG).
    """
    x = images.detach().float().cpu()
    steps = [(x.diff(dim=d)).abs().mean((1, 2, 3)) for d in (2, 3)]
    return torch.cat([x.mean((2, 3)), x.std((2, 3)), torch.stack(steps, 1)], 1)

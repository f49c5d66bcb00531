"""``mmsae evaluate --gallery``: the images that latents of an image tower answer to, beside those of random weights.

Which images these are is known from the features of a set. What is drawn is read and encoded once more, image by image,
and kept as a thumbnail only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from mmsae.evaluation.card.top_images import SAME, TOP, Purity, purity
from mmsae.evaluation.features import Features
from mmsae.evaluation.options import RANDOM
from mmsae.evaluation.rows import TRAINED
from mmsae.evaluation.shifts import shift
from mmsae.evaluation.suite_data import SuiteData
from mmsae.hosts import Host
from mmsae.metrics.concepts.names import LatentName
from mmsae.metrics.sparsity import latent_sums
from mmsae.report.gallery import Card, Gallery, Thumbnail, thumbnail
from mmsae.report.page import Section, render_report
from mmsae.shards import FaultLog, Sample, read_shard, with_image
from mmsae.types import IMAGE, ImageTextBatch, InputError

SIZE = 112  # pixels of a thumbnail
DARK = 0.5  # brightness where a latent is silent
INTRO = {
    "best": "The latents whose nine strongest images agree most in class: a selection, the same for the SAE and for "
    "random weights.",
    "strong": "The latents with the largest share of the code's energy.",
    "drawn": "Drawn among the latents that fire on at least nine images: what an ordinary latent looks like.",
}


class Shown(NamedTuple):
    """A latent to draw."""

    control: str  #: Empty, or ``random``
    latent: int  #: Index of the latent


def check_host(host: Host) -> None:
    """Refuse a host whose images cannot be drawn.

    Raises:
        InputError: It makes inputs of its own and has no plain images.
    """
    if host.reading({IMAGE})["collate"] is not None:
        raise InputError(f"--gallery: host {host.hint} has no plain images; mmsae weights has a gallery of its tokens")


def write_top_gallery(
    path: Path, data: SuiteData, number: int, name: str = "train", names: Mapping[int, LatentName] | None = None
) -> Path:
    """Write the page of ``number`` latents of a kind of the SAE, and of random weights, on the images of a set.

    ``names`` are those of the SAE's latents.
    """
    sides = {TRAINED: data.features(name), RANDOM: data.control(name)}
    found = {c: purity(f.z, f.labels) for c, f in sides.items()}
    labelled = bool((sides[TRAINED].labels >= 0).any())
    chosen = {c: choose(p, sides[c], number, labelled, data.seed) for c, p in found.items()}
    shown = [Shown(c, j) for c, kinds in chosen.items() for ids in kinds.values() for j in ids]
    wanted: dict[str, list[Shown]] = {}
    for s in dict.fromkeys(shown):
        for row in found[s.control].rows[s.latent].tolist():
            if row >= 0:
                wanted.setdefault(sides[s.control].uids[row], []).append(s)
    classes = data.classes.names if labelled else []
    drawn = draw(data, name, wanted, classes)
    sections = []
    for control, kinds in chosen.items():
        of = "random weights" if control else "the SAE"
        for kind, ids in kinds.items():
            title = {"best": "Purest latents", "strong": "Strongest latents", "drawn": "Latents at random"}[kind]
            own = {} if control else names or {}
            cards = [named(card(Shown(control, j), found[control], sides[control], classes, drawn), own.get(j))
                     for j in ids]  # fmt: skip
            intro = INTRO[kind] if ids else f"No latent fires on {TOP} images."
            sections.append(Section(f"{title} of {of}", intro, galleries=[Gallery(cards)]))
    lead = f"The {TOP} images of {name} ({sides[TRAINED].n:,}) on which a latent is largest, the largest first."
    if data.token_site():
        lead += (
            " A latent fires at places of an image: dark is where it is silent, the frame is around the place where it "
            "is strongest."
        )
    meta = {"host": data.host.hint, "site": str(data.sae.sites[IMAGE].module), "latents": f"{data.sae.d_sae:,}"}
    return render_report(path, "Images that latents answer to", sections, lead=lead, meta=meta)


def choose(p: Purity, f: Features, number: int, labelled: bool, seed: int) -> dict[str, list[int]]:
    """``{kind: latents}`` of one SAE: the purest (without classes the strongest), and a random draw."""
    energy = latent_sums(f.z)[1]
    alive = p.whole.nonzero()[:, 0]
    key = p.count.double() + energy / energy.sum().clamp(min=1e-300) if labelled else energy  # energy breaks ties
    best = alive[key[alive].argsort(descending=True, stable=True)][:number]
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    return {"best" if labelled else "strong": best.tolist(), "drawn": alive[order[:number]].sort().values.tolist()}


def card(s: Shown, p: Purity, f: Features, names: Sequence[str], drawn: Mapping[tuple[Shown, str], Thumbnail]) -> Card:
    """One latent: how often it fires, what class its images are of, and the images."""
    fires = f"{(f.z.gather(torch.tensor([s.latent]))[:, 0] != 0).double().mean().item():.1%} of images"
    if f.tokens is not None:
        at = f.z.indices == s.latent
        fires += f", {(f.tokens.fires * at).sum() / f.sums.rows.sum():.1%} of tokens"
    facts, name = [("fires on", fires)], ""
    if p.label[s.latent] >= 0:
        count, label = int(p.count[s.latent]), names[p.label[s.latent]]
        name = label if count >= SAME else ""
        facts.append((f"{count} of {TOP}", label if count > 1 else "of one class"))
    images = [drawn[s, f.uids[r]] for r in p.rows[s.latent].tolist() if r >= 0 and (s, f.uids[r]) in drawn]
    return Card(s.latent, name, facts, images, [])


def named(shown: Card, name: LatentName | None) -> Card:
    """The card with the name that ``mmsae name`` or a person gave, and where it comes from; why there is none."""
    if name is None:
        return shown
    if name.name is None:
        return shown._replace(facts=[*shown.facts, ("no name", name.note or name.provenance())])
    return shown._replace(name=name.name, facts=[*shown.facts, ("named by", name.provenance())])


@torch.no_grad()
def draw(
    data: SuiteData, name: str, wanted: Mapping[str, Sequence[Shown]], names: Sequence[str], dark: float = DARK
) -> dict[tuple[Shown, str], Thumbnail]:
    """The thumbnails of some images of a set, ``{uid: latents that it is shown for}``; ``dark`` is their brightness
    where a latent is silent.
    """
    transform, change = data.host.transform(), shift(data.suite.data[name].change)
    saes, site, out = {TRAINED: data.sae, RANDOM: data.random}, data.sae.sites[IMAGE], {}
    f = data.features(name)
    class_of = {u: names[c] if c >= 0 else "" for u, c in zip(f.uids, f.labels.tolist(), strict=True)}
    stream, size = _samples(data.suite.paths(name), wanted), data.host.batch_size(data.run.batch_size)
    while samples := list(islice(stream, size)):
        images = change(torch.stack([transform(s.image) for s in samples]))
        columns = [[getattr(s, k) for s in samples] for k in ("uid", "caption", "key", "shard")]
        rows = data.host.read(ImageTextBatch(images, None, *columns), [site])[0]
        codes = {c: saes[c].encode(rows.x, IMAGE) for c in {s.control for u in samples for s in wanted[u.uid]}}
        shown = plain(images, transform)
        for i, sample in enumerate(samples):
            own = rows.item == i
            for s in wanted[sample.uid]:
                z = codes[s.control].rows(own).gather(torch.tensor([s.latent], device=rows.x.device))[:, 0].cpu()
                special = None if rows.special is None else rows.special[own].cpu()
                thumb = lit(shown[i], z, special, dark)
                what = " ".join(filter(None, (class_of[sample.uid], sample.key)))
                out[s, sample.uid] = thumbnail(thumb, what, float(z.max()), SIZE, photo=True)
    return out


def _samples(paths: Sequence[str], uids: Mapping[str, object]) -> Iterator[Sample]:
    for path in paths:
        for s in read_shard(path, FaultLog(), need=("image",), decode=False):
            if s.uid in uids and (s := with_image(s, FaultLog())) is not None:
                yield s


def plain(images: Tensor, transform: object) -> Tensor:
    """``(B, 3, H, W)`` images in [0, 1] from what a host's transform made, whose normalisation is taken back.

    Where a transform has none that can be found, each image is stretched to [0, 1].
    """
    for step in getattr(transform, "transforms", ()):
        if hasattr(step, "mean") and hasattr(step, "std"):
            mean, std = (torch.as_tensor(v, dtype=images.dtype).view(-1, 1, 1) for v in (step.mean, step.std))
            return (images * std + mean).clamp(0, 1)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-12)


def grid_of(n: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of n places of an image of this size, or None where they are no grid of its shape."""
    rows = max(1, round((n * height / width) ** 0.5))
    return (rows, n // rows) if n > 1 and n % rows == 0 else None


def lit(image: Tensor, z: Tensor, special: Tensor | None, dark: float = DARK) -> Tensor | Image.Image:
    """An image ``(3, H, W)`` lit by a latent's values ``z (T,)`` at its places, with a frame around the strongest.

    Sites of one row per image, and tokens that are no grid, leave it as it is. Class and register tokens have no place:
    where one of them is the strongest there is no frame.
    """
    places = z if special is None else z[~special]
    if len(z) == 1 or (grid := grid_of(len(places), *image.shape[1:])) is None:
        return image
    rows, cols = grid
    top = places.max()
    heat = (places / top if top > 0 else torch.zeros_like(places)).clamp(min=0).view(1, 1, rows, cols)
    big = interpolate(image[None], [round(s * SIZE / max(image.shape[1:])) for s in image.shape[1:]], mode="bilinear",
                      antialias=True, align_corners=False)[0]  # fmt: skip
    light = interpolate(heat, big.shape[1:], mode="bilinear", align_corners=False)[0]
    array = (big * (dark + (1 - dark) * light)).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    out = Image.fromarray(array)
    if top > 0 and top == z.max():
        row, col = divmod(int(places.argmax()), cols)
        h, w = big.shape[1] / rows, big.shape[2] / cols
        box = [round(col * w) - 1, round(row * h) - 1, round((col + 1) * w), round((row + 1) * h)]
        box = [min(max(v, 2), s - 3) for v, s in zip(box, out.size * 2, strict=True)]  # whole at the edges, too
        pen = ImageDraw.Draw(out)
        pen.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2], outline=(20, 20, 20))
        pen.rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], outline=(255, 214, 10), width=2)
    return out

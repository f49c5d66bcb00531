"""Host and SAEs of a job of evidence: what fires in the rows of a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.hosts import Answers, Encoder, Host, LVLMHost, as_encoder, load_host, pick_device
from mmsae.interpret.evidence.drawn import PROMPTS, draw_rows, steps_read, text_batches
from mmsae.interpret.evidence.marks import MarkingCollate, SampleMarks, image_marks
from mmsae.interpret.evidence.options import Evidencing
from mmsae.interpret.evidence.places import PlacedRows, place_rows, words_of
from mmsae.interpret.evidence.rows import FiredRows, Looked, entries
from mmsae.interpret.evidence.view import ProcessorPixels, Views
from mmsae.load import load_pair
from mmsae.lvlm.tokens import segment_sites
from mmsae.options import Drawing, SAERun
from mmsae.sae import SAE
from mmsae.shards import FaultLog, UnitBatch, read_shard, unit_batches
from mmsae.shards.batches import IF_ANY
from mmsae.shards.decode import find_image
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError, Site

PEEK = 200  # samples that tell whether a corpus has images and captions


class EvidencePlan(NamedTuple):
    """One pass of evidence; plain values, so that it travels to other processes."""

    saes: tuple[str, ...]  #: Folders or hub ids; one is empty: given as an object, so that there is one process
    host: str  #: Name; empty: likewise
    paths: list[str]  #: All tars
    works: tuple[str, ...]  #: The working folder of each SAE's job
    modalities: tuple[str, ...]  #: Those with codes
    captions: bool  #: Whether the corpus has captions
    images: bool  #: Whether it has images
    choice: Evidencing  #: What is kept
    run: SAERun  #: Where and how to compute
    batch_size: int  #: Samples per batch
    workers: int  #: Decoding processes per device
    caption_field: str  #: Field of json with the caption
    fault_limit: float  #: Share of dropped samples that is tolerated
    drawing: Drawing | None  #: How captions are drawn, for an SAE of a denoiser; None: images are the corpus's

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps at which a denoiser is read."""
        return () if self.drawing is None else steps_read(self.drawing, self.choice.at_steps)


class Content(NamedTuple):
    """What a corpus has."""

    images: bool  #: Whether there are images
    captions: bool  #: Whether there are captions

    @classmethod
    def of(cls, paths: Sequence[str], caption_field: str) -> Content:
        """By its first samples."""
        if str(paths[0]).endswith(PROMPTS):
            return cls(False, True)
        stream = (s for p in paths for s in read_shard(p, FaultLog(), need=(), decode=False,
                                                       caption_field=caption_field))  # fmt: skip
        samples = list(islice(stream, PEEK))
        return cls(any(find_image(s.raw) for s in samples), any(s.caption for s in samples))

    def modalities(self, sites: Sequence[str], first: str, draws: bool = False) -> tuple[str, ...]:
        """Those modalities of an SAE that there are; a host that draws makes images of captions.

        Raises:
            InputError: None of them.
        """
        has = {IMAGE: self.captions if draws else self.images, TEXT: self.captions}
        found = tuple(m for m in (IMAGE, TEXT) if m in sites and has[m])
        if not found:
            names = {IMAGE: "images", TEXT: "captions"}
            raise InputError(
                f"the SAE is of {' and '.join(names[m] for m in sites)}, and {first} has "
                f"{' and '.join(names[m] for m in has if has[m]) or 'neither images nor captions'}"
            )
        return found


class EvidenceReader:
    """Loads what a plan names.

    Args:
        plan: The job.
        saes: Where they are loaded already.
        host: Likewise.
        rank: Which device.

    Raises:
        InputError: The host cannot be loaded, an SAE is of another one, or two are not of the same sites.
    """

    def __init__(
        self, plan: EvidencePlan, saes: Sequence[SAE | str] = (), host: Host | str = "", rank: int = 0
    ) -> None:
        run, given = plan.run, list(saes) or list(plan.saes)
        self.plan, device = plan, pick_device(run.device, rank)
        self.host: Host | str = host or plan.host
        self.saes: list[SAE] = []
        for sae in given:
            loaded, self.host = load_pair(sae, self.host, device, run.precision, run.allow_other_site)
            self.saes.append(loaded)
        made = [read_sites(s, self.host, run.allow_other_site) for s in self.saes]
        self.sites = made[0]
        for i, other in enumerate(made):
            if (here := _specs(other)) != (first := _specs(self.sites)):
                raise InputError(
                    f"SAE {plan.saes[i] or i} reads {here}, and {plan.saes[0] or 'the first'} {first}: SAEs whose "
                    "evidence is collected together read the same sites"
                )
        self.embedder: Encoder | None = self.host if isinstance(self.host, Encoder) else None
        if plan.choice.embedder:
            found = load_host(plan.choice.embedder, device=device, precision=run.precision)
            self.embedder = as_encoder(found, "embedder")

    @property
    def embeds(self) -> tuple[str, ...]:
        """Modalities whose embeddings are kept."""
        if self.embedder is None:
            return ()
        has = {IMAGE: IMAGE in self.plan.modalities and self.plan.images, TEXT: self.plan.captions}
        return tuple(m for m in (IMAGE, TEXT) if has[m] and m in self.embedder.modalities)

    def stream(self, paths: Sequence[str]) -> Iterator[UnitBatch]:
        """Batches of some tars, with their marks."""
        plan = self.plan
        own = {*plan.modalities, *(self.embeds if self.embedder is self.host else ())}
        draws = plan.drawing is not None
        if draws and own == {IMAGE}:
            reading = {"transform": None, "tokenize": None, "collate": None}
        else:
            reading = self.host.reading(own - {IMAGE} if draws else own, plan.choice.text)
        other = None
        if self.embeds and self.embedder is not self.host:
            other = self.embedder.reading(self.embeds)
            other["transform"] = None if draws else other["transform"]
        need = list(getattr(reading["collate"], "need", ()))
        wants = {IMAGE: IMAGE in plan.modalities and not draws, TEXT: TEXT in plan.modalities or draws}
        need += [n for m, n in ((IMAGE, "image"), (TEXT, "caption")) if wants[m] and not need]
        if plan.images and "image" not in need and not draws:
            need.append(IF_ANY)
        collate = MarkingCollate(reading, self._views(), need, plan.choice.pixels, plan.choice.label, other)
        if str(plan.paths[0]).endswith(PROMPTS):
            return text_batches(paths, plan.batch_size, collate)
        return unit_batches(
            list(paths), None, None, plan.batch_size, workers=plan.workers, collate=collate, need=need,
            caption_field=plan.caption_field, unique=False, pin_memory=self.host.device.type == "cuda",
        )  # fmt: skip

    def _views(self) -> Views:
        if IMAGE not in self.plan.modalities:
            return Views(None)
        if isinstance(self.host, LVLMHost):
            return Views(ProcessorPixels(self.host.collate))
        return Views(self.host.transform() if isinstance(self.host, Encoder) else None)

    @torch.no_grad()
    def look(self, batch: ImageTextBatch, log: FaultLog, which: Collection[int] | None = None) -> dict[int, Looked]:
        """What fires in a batch, by the number of the SAE; items in which the host gives inf or NaN are counted and
        left out.

        The host reads the batch once; ``which`` are the SAEs that are asked, None: all.
        """
        marks, batch = SampleMarks.take(batch)
        marks, placed, embed = self._read(batch, marks)
        good = torch.ones(len(batch.uids), dtype=torch.bool, device=self.host.device)
        words = {}
        for m, p in placed.items():
            good[p.rows.item[~p.rows.x.isfinite().all(1)]] = False
            words[m] = words_of(self.host, self.sites[m], p.rows, batch)
        for e in embed.values():
            good &= e.isfinite().all(1)
        for i in (~good).nonzero()[:, 0].tolist():
            log.add("not_finite", batch.shards[i], batch.keys[i], "the host gave inf or nan")
        embed = {m: _unit(e.float(), m, batch.captions) for m, e in embed.items()}
        words = {m: w for m, w in words.items() if w is not None}
        out = {}
        for i in range(len(self.saes)) if which is None else which:
            fired = {m: fire(self.saes[i], m, p) for m, p in placed.items()}
            out[i] = Looked(batch, marks, fired, embed, words).of(good)
        return out

    def _read(
        self, batch: ImageTextBatch, marks: SampleMarks
    ) -> tuple[SampleMarks, dict[str, PlacedRows], dict[str, Tensor]]:
        """Rows of a batch with their places, and embeddings."""
        plan, placed = self.plan, {}
        if plan.drawing is not None:
            args = (batch, plan.drawing, plan.steps, plan.choice.seed)
            images, placed[IMAGE] = draw_rows(self.host, self.sites[IMAGE], *args)
            marks = marks._replace(**image_marks(images, Views(None), plan.choice.pixels))
            if IMAGE in self.embeds:
                transform = self.embedder.reading({IMAGE})["transform"]
                marks = marks._replace(images=torch.stack([transform(i) for i in images]))
        names = [m for m in plan.modalities if m not in placed]
        embeds = self.embeds
        same = self.embedder is self.host
        asked = [*(self.sites[m] for m in names), *(f"{m}.embed" for m in embeds if same)]
        read = self.host.read(batch, asked) if asked else []
        for m, rows in zip(names, read, strict=False):
            placed[m] = place_rows(self.host, self.sites[m], rows, batch)
        if same:
            return marks, placed, dict(zip(embeds, (r.x for r in read[len(names) :]), strict=True))
        return marks, placed, self._other(marks, batch) if embeds else {}

    def _other(self, marks: SampleMarks, batch: ImageTextBatch) -> dict[str, Tensor]:
        """What another host embeds."""
        held = batch._replace(images=marks.images, texts=marks.texts, inputs=None)
        read = self.embedder.read(held, [f"{m}.embed" for m in self.embeds])
        return {m: r.x for m, r in zip(self.embeds, read, strict=True)}


def fire(sae: SAE, modality: str, placed: PlacedRows) -> FiredRows:
    """The entries of an SAE's codes of some rows."""
    own = modality if modality in sae.modalities else sae.modalities[0]
    codes = sae.encode(placed.rows.x, own, finite=False)
    return entries(placed.rows.item, placed.place, codes.values, codes.indices, placed.grid, placed.places, codes.d_sae)


def _specs(sites: Mapping[str, Site]) -> str:
    return " and ".join(f"{m} at {s.spec}" for m, s in sites.items())


def read_sites(sae: SAE, host: Host, allow_other_site: bool = False) -> dict[str, Site]:
    """Where the rows of an SAE are read: both segments of a sequence of images and text, else its own sites."""
    segments = all(s.tokens in ("image", "text", "text_all", "all") for s in sae.sites.values())
    if isinstance(host, Answers) and segments:
        return segment_sites(sae, host, allow_other_site)
    return {m: host.site(s, allow_other_site) for m, s in sae.sites.items()}


def _unit(x: Tensor, modality: str, captions: Sequence[str]) -> Tensor:
    x = torch.nn.functional.normalize(x, dim=1).cpu()
    if modality == TEXT:
        x[torch.tensor([not c for c in captions])] = 0
    return x

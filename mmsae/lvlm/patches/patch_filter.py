"""Which patches of an image does a vision-language model need? The patch filter of SAE-V (arXiv 2502.17514).

Every patch gets a score from the SAE's latents on its tokens; the best share stays, the others are painted black, and
the model is asked again. If a score knows what matters, the model answers better than with as many patches at random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.files import write_json
from mmsae.hosts import pick_device
from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.jobs import JobFolder
from mmsae.jobs.units import Engine, Share, Work, do_missing
from mmsae.load import load_pair
from mmsae.lvlm.options import PatchChoice
from mmsae.lvlm.tokens import encode_tokens, named_lvlm, segment_sites, shown_image
from mmsae.lvlm.weights.file import CrossModalFile, load_weights
from mmsae.metrics.pairs.item_codes import content_rows, entries
from mmsae.options import OneProcessRun
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, Sample, draw, expand, identity, place, read_shard, taken, with_image
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError

ALL, RESULTS = "all", "results.json"


def token_scores(
    codes: Codes, weights: Tensor | None, partners: Tensor | None = None, delta: float = 0.0
) -> dict[str, Tensor]:
    """``{score: (N,)}`` of N image tokens, without ``cos`` where there are no weights.

    ``l0`` counts latents, ``l1`` adds their values, ``co_l0`` counts partners, and ``cos`` adds weights. A latent
    counts above ``delta``. ``weights (d_sae,)`` are NaN where there is none. ``partners (N, d_sae)`` are the latents
    that fire on the text beside each token's image. (The published code takes one chosen set for all.)
    """
    row, latent, value = entries(codes)
    on = value > delta
    row, latent, value = row[on], latent[on], value[on].double()

    def add(what: Tensor) -> Tensor:
        return torch.zeros(codes.n, dtype=torch.float64, device=value.device).index_add_(0, row, what)

    out = {"l0": add(torch.ones_like(value)), "l1": add(value)}
    if partners is not None:
        out["co_l0"] = add(partners[row, latent].double())
    if weights is not None:
        out["cos"] = add(weights.to(value.device).double().nan_to_num(0)[latent])
    return out


def kept_patches(scores: np.ndarray, keep: float, tie: np.ndarray) -> np.ndarray:
    """Bool mask of the best ``keep`` of all patches, rounded up; ``tie`` decides between equal scores.

    Published: all at or below the percentile go black, which is the same without ties; with ties (``l0`` of a TopK SAE
    is the same everywhere) it would leave too few, or none.
    """
    n = math.ceil(round(keep * scores.size, 9))
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.lexsort((tie.ravel(), -scores.ravel()))[:n]] = True
    return mask.reshape(scores.shape)


def blacken(image: Image.Image, kept: np.ndarray) -> Image.Image:
    """The image with black in the cells of the grid ``kept (rows, cols)`` that are false."""
    pixels = np.array(image.convert("RGB"))
    rows, cols = (np.arange(s) * k // s for s, k in zip(pixels.shape[:2], kept.shape, strict=True))
    pixels[~kept[rows[:, None], cols[None]]] = 0
    return Image.fromarray(pixels)


def is_right(said: str, wanted: str) -> bool:
    """Whether an answer begins with the words of the right one; case and punctuation do not matter."""
    a, b = ("".join(c if c.isalnum() else " " for c in text.lower()).split() for text in (said, wanted))
    return bool(b) and a[: len(b)] == b


class PatchFilter:
    """Asks a host about images of which patches are black.

    Cross-modal ``weights`` are for the score ``cos``; a latent counts above their ``delta``, else above 0.
    """

    def __init__(self, host: LVLMHost, sae: SAE, choice: PatchChoice, weights: CrossModalFile | None = None):
        self.host, self.sae, self.choice, self.file = host, sae, choice, weights
        self.sites = segment_sites(sae, host)
        self.weights, self.delta = (None, 0.0) if weights is None else weights[:2]

    def maps(self, batch: ImageTextBatch) -> list[dict[str, np.ndarray]]:
        """``{score: (rows, cols)}`` of every image; where a patch has two tokens (LLaVA-NeXT), their mean."""
        tokens = self.host.capture(batch, self.sites)
        codes = encode_tokens(self.sae, tokens)
        text = content_rows(tokens, TEXT)
        said = torch.zeros(len(batch.uids), self.sae.d_sae, dtype=torch.bool, device=self.host.device)
        row, latent, value = entries(codes[TEXT])
        on = (value > self.delta) & text[row]
        said[tokens.item[TEXT][row[on]], latent[on]] = True
        found = token_scores(codes[IMAGE], self.weights, said[tokens.item[IMAGE]], self.delta)
        found["norm"] = tokens.x[IMAGE].double().norm(dim=1)  # the control that needs no SAE
        out = []
        for grid in self.host.grid(batch):
            place = tokens.position[IMAGE] - grid.start
            own = (tokens.item[IMAGE] == grid.item) & (place >= 0) & (place < grid.layout.length)
            empty = torch.zeros(grid.layout.length, dtype=torch.float64)
            at = (place[own].cpu(),)
            maps = {name: grid.heat(empty.index_put(at, v[own].cpu())).numpy() for name, v in found.items()}
            rng = np.random.default_rng([self.choice.seed, int(draw(batch.uids[grid.item]) * 2**31)])
            out.append(maps | {"random": rng.random(next(iter(maps.values())).shape)})
        return out

    @torch.no_grad()
    def ask(self, samples: Sequence[Sample], faults: FaultLog | None = None) -> dict[str, list[bool]]:
        """``{shown: was each answer right}``, where ``all`` or ``SCORE/KEEP`` is shown; one decoded image a sample.

        ``faults`` counts the samples that the host refuses, which are left out.
        """
        collate = self.host.collator("question")
        batch, samples = taken(collate, samples, FaultLog() if faults is None else faults, place)
        if batch is None:
            return {}
        grids = self.host.grid(batch)
        if len(grids) != len(samples):
            raise InputError(f"{len(samples)} samples have {len(grids)} images; the patch filter needs one each")
        maps = self.maps(batch)
        images = [shown_image(self.host, batch, i, s.image) for i, s in enumerate(samples)]
        shown = {ALL: images}
        for name in self.choice.scores:
            for share in self.choice.keep:
                masks = [kept_patches(m[name], share, m["random"]) for m in maps]
                shown[f"{name}/{share:g}"] = [blacken(x, k) for x, k in zip(images, masks, strict=True)]
        out = {}
        for name, painted in shown.items():
            painted = collate([s._replace(image=x) for s, x in zip(samples, painted, strict=True)])
            said = self.host.answer(painted, max_new_tokens=self.choice.max_new_tokens)
            out[name] = [is_right(a, str(s.meta["answer"])) for a, s in zip(said, samples, strict=True)]
        return out


class PatchJob:
    """The patch filter over the samples of shards; arguments are those of :func:`filter_patches`.

    Attributes:
        asker: What asks, on the device of process ``rank``.
        folder: Where the job is done.
    """

    def __init__(
        self, sae: str, host: str, weights: str | None, choice: PatchChoice, shards: str | Sequence[str],
        out: str | Path, run: OneProcessRun, rank: int,
    ) -> None:  # fmt: skip
        model, name = named_lvlm(sae, host)
        choice.check(weights is not None)
        device = pick_device(run.device, rank)
        model, loaded = load_pair(model, name, device, run.precision, run.allow_other_site)
        file = None if weights is None else load_weights(weights)
        if file is not None:
            file.check(model, loaded.fingerprint)
        self.asker, self.run, paths = PatchFilter(loaded, model, choice, file), run, expand(shards)
        job = {"sae": sae_fingerprint(model), "host": loaded.fingerprint, "batch_size": run.batch_size}
        job |= {**asdict(choice), "weights": None if file is None else file.info, "shards": identity(paths)}
        self.folder = JobFolder(out, job, "mmsae patches")
        self.parts = self.folder.parts(paths)

    def work(self, share: Share) -> None:
        """Write the parts of some tars."""
        self.parts.work(self._part, share, "patches", self.run.progress)

    def _part(self, path: str) -> bytes:
        c, size = self.asker.choice, self.run.batch_size
        right: dict[str, list[bool]] = {}
        faults, chosen = FaultLog(), []
        for s in read_shard(path, faults, need=self.asker.host.collate.need, decode=False):
            said = s.meta.get("answer")
            fits = said is not None and (not c.answers or str(said) in c.answers)
            if fits and (c.samples is None or len(chosen) < c.samples) and (s := with_image(s, faults)) is not None:
                chosen.append(s)
        for i in range(0, len(chosen), size):
            for shown, hits in self.asker.ask(chosen[i : i + size], faults).items():
                right.setdefault(shown, []).extend(hits)
        return json.dumps({"right": right, "faults": faults.to_dict()}).encode()


def _elsewhere(rank: int, *given: Any) -> Work:
    """What does a process's tars, in a process that has loaded nothing."""
    return PatchJob(*given, rank).work


def filter_patches(
    sae: str, host: str, weights: str | None, choice: PatchChoice, shards: str | Sequence[str], out: str | Path,
    run: OneProcessRun, fault_limit: float, engine: Engine,
) -> dict[str, Any]:  # fmt: skip
    """Ask about the samples of shards, tar by tar, and write results.json and patches.png.

    Arguments are those of :func:`mmsae.lvlm.patches.command.patches`.

    Raises:
        InputError: Another job in the folder, no sample with an answer, or too many unusable samples.
    """
    engine.decoders(run.workers)
    given = (sae, host, weights, choice, shards, out, run)
    job = PatchJob(*given, engine.rank)
    with job.folder.under(engine):
        do_missing(engine, job.parts.tally, job.work, _elsewhere, *given)
        engine.merge(lambda: False, lambda: _write(job, shards, fault_limit))
    return {**json.loads((Path(out) / RESULTS).read_text(encoding="utf-8")), "out": str(out)}


def _write(job: PatchJob, shards: str | Sequence[str], fault_limit: float) -> None:
    """Merge the parts and write the result."""
    c, log, right, folder = job.asker.choice, FaultLog(), {}, job.folder.out
    for part in job.parts.files():
        found = json.loads(part.read_text())
        log.merge(FaultLog.from_dict(found["faults"]).take())
        for shown, hits in found["right"].items():
            right.setdefault(shown, []).extend(hits)
    log.check(fault_limit, final=True)
    if not right:
        raise InputError(f"no sample of {shards} has an answer{f' of {list(c.answers)}' * bool(c.answers)} in its json")
    n = len(right[ALL])
    share = {shown: sum(hits) / n for shown, hits in right.items()}
    table = {shown: {"accuracy": p, "error": math.sqrt(p * (1 - p) / n)} for shown, p in share.items()}
    results = {
        "table": table,
        "questions": n,
        "keep": list(c.keep),
        "scores": list(c.scores),
        "host": job.asker.host.hint,
    }
    write_json(folder / RESULTS, results)
    plot(results, folder / "patches.png")
    if job.run.progress:
        print(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """Accuracy by score and share kept."""
    t = results["table"]
    rows = [[f"{k:.0%}", *(t[f"{s}/{k:g}"]["accuracy"] for s in results["scores"])] for k in results["keep"]]
    body = markdown_table(["kept", *results["scores"]], rows)
    return f"{body}\n\nall patches: {t[ALL]['accuracy']:.3f}, {results['questions']} questions"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the same, with standard errors."""
    from matplotlib.figure import Figure

    from mmsae.report.figures import write_png

    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax, t = fig.subplots(), results["table"]
    shares = [1.0, *sorted(results["keep"], reverse=True)]
    for name in results["scores"]:
        rows = [t[ALL], *(t[f"{name}/{k:g}"] for k in shares[1:])]
        style = {"ls": "--", "color": "0.4"} if name == "random" else {}
        ax.errorbar(shares, [r["accuracy"] for r in rows], [r["error"] for r in rows], label=name, capsize=2, **style)
    ax.invert_xaxis()
    ax.set(xlabel="share of patches kept", ylabel="accuracy")
    ax.legend(frameon=False)
    write_png(fig, path, dpi=130)

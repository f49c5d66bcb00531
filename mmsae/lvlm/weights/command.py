"""Cross-modal weights of an SAE on a vision-language host: the function, the command and the LightningModule.

All three do :class:`~mmsae.lvlm.weights.job.WeightsJob`, so they write the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmsae.hosts import Host, load_host, named_host, pick_device
from mmsae.jobs.lightning import LitUnits
from mmsae.lvlm.weights.file import load_weights
from mmsae.lvlm.weights.job import Found, Subset, TextChoice, WeightsJob
from mmsae.sae import SAE
from mmsae.shards import FAULT_LIMIT, UnitBatch

__all__ = ["LitWeights", "Subset", "cross_modal_weights", "weights"]


def open_job(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str | None = None,
    text: TextChoice = "question",
    mode: str = "all_pairs",
    selection: str = "per_modality",
    n_pool: int = 30,
    n_side: int = 5,
    delta: float = 0.0,
    delta_quantile: float | None = None,
    center: bool = False,
    samples: int | None = 1000,
    batch_size: int = 8,
    workers: int = 0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    fault_limit: float = FAULT_LIMIT,
    allow_other_site: bool = False,
) -> WeightsJob:
    """A job with its host and SAE loaded.

    Args:
        sae: SAE folder or hub id, trained on image and text tokens of a vision-language model.
        shards: Path, folder, glob or brace pattern of tars, or several.
        out: Folder to write.
        host: Name of the host (``lvlm:FOLDER`` or ``lvlm:HUB_ID``); default: the SAE's own.
        text: ``question``: prompt and image alone, as in the published scores; ``question+answer``: with json's answer.
        mode: ``all_pairs``, ``rank_matched`` or ``centroid``.
        selection: ``per_modality``: the strongest tokens of each side; ``pooled``: those among the strongest
            ``n_pool`` of both sides (the published code).
        n_pool: See ``selection``.
        n_side: Tokens of each side that are compared; latents with fewer have no weight.
        delta: Activations up to this one are no evidence. The published 1.0 is in units of its own scaled states.
        delta_quantile: Instead of ``delta``: a quantile of the positive activations.
        center: Take the mean state off first.
        samples: About this many samples are looked at, chosen by a hash of their uid; null for all.
        batch_size: Samples per forward pass.
        workers: Decoding processes.
        seed: Of the choice of samples.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        fault_limit: Largest share of samples that may be unusable.
        allow_other_site: Accept an SAE that was trained on another host.
    """
    model = SAE.from_pretrained(sae)
    device = pick_device(device)
    loaded = load_host(named_host(host, model.sites, f"SAE {sae}"), device=device, precision=precision)
    definition = {"mode": mode, "selection": selection, "n_pool": n_pool, "n_side": n_side, "delta": delta}
    definition |= {"delta_quantile": delta_quantile, "center": center}
    return WeightsJob(
        loaded, model.to(device), shards, out, text=text, definition=definition, samples=samples,
        batch_size=batch_size, workers=workers, seed=seed, fault_limit=fault_limit, allow_other_site=allow_other_site,
    )  # fmt: skip


def weights(
    sae: str,
    shards: str | list[str],
    out: str,
    progress: bool = True,
    present: Callable[[Found], None] | None = None,
    again: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Cross-modal weights of every latent: are its strongest text and image tokens alike?

    Run again after a kill, it goes on; run again after it ended, it does nothing.

    Args:
        sae: SAE folder or hub id, trained on image and text tokens of a vision-language model.
        shards: Path, folder, glob or brace pattern of tars, or several.
        out: Folder to write.
        progress: Whether to show bars and print.
        present: Called with the result before it appears, to put a page beside it.
        again: Whether to call it for a result that is there already, too.
        **options: The other arguments of :func:`open_job`.

    Returns:
        ``weights.json``, with the folder as ``out``.
    """
    return run(open_job(sae, shards, out, **options), progress, present, again)


def cross_modal_weights(
    host: Host,
    sae: SAE,
    shards: str | Sequence[str],
    out: str | Path,
    *,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """:func:`weights` with a host and an SAE that are loaded; ``options`` are those of ``WeightsJob``.

    Raises:
        InputError: Another job in the folder, an SAE of another site, or too many unusable samples.
    """
    return run(WeightsJob(host, sae, shards, out, **options), progress)


def run(
    job: WeightsJob, progress: bool = True, present: Callable[[Found], None] | None = None, again: bool = False
) -> dict[str, Any]:
    """Do a job in this process."""
    if job.finished:
        if again and present is not None:
            present(job.found())
        if progress:
            print(f"{job.out}: finished before; {'only the page is new' if again else 'nothing to do'}")
        return {**load_weights(job.out).info, "out": str(job.out)}
    job.begin()
    if progress:
        print(job.describe())
    todo = job.todo()
    with tqdm(desc="weights", unit="sample", disable=not progress) as bar:
        for step in job.batches(todo):
            job.add(step)
            bar.update(len(step.batch.uids))
    return _end(job, present, progress)


def _end(job: WeightsJob, present: Callable[[Found], None] | None, progress: bool) -> dict[str, Any]:
    log = job.finish(present)
    found = load_weights(job.out).info
    if progress:
        print(log.summary())
        print(f"{found['weighted']} latents have a weight ({found['coverage']:.0%} of those that fire)")
    return {**found, "out": str(job.out)}


class LitWeights(LitUnits):
    """``mmsae weights`` for ``Trainer.predict``: an SAE, a host and the metrics, on any number of ranks.

    Args:
        sae: SAE folder or hub id, trained on image and text tokens of a vision-language model.
        shards: Path, folder, glob or brace pattern of tars, or several.
        out: Folder to write.
        **options: The other arguments of :func:`open_job`; the trainer chooses the device.
    """

    present: Callable[[Found], None] | None = None

    def __init__(self, sae: str, shards: str | list[str], out: str, **options: Any):
        super().__init__()
        self.sae, self.shards, self.out = sae, shards, out
        self.options = options  # on a line of its own: jsonargparse reads from it which options there are

    def begin(self) -> bool:
        """Load SAE and host."""
        self.job = open_job(self.sae, self.shards, self.out, device=self.root_device, **self.options)
        if self.trainer.is_global_zero:
            print(f"{self.out}: finished before; nothing to do" if self.job.finished else self.job.describe())
            if not self.job.finished:
                self.job.begin()
        self.trainer.strategy.barrier("begun")
        return not self.job.finished

    def batches(self) -> Iterator[UnitBatch]:
        """Batches of this rank's tars."""
        todo = self.trainer.strategy.broadcast(self.job.todo())
        return self.job.batches(todo[self.trainer.global_rank :: self.trainer.world_size])

    def add(self, step: UnitBatch) -> None:
        """Add a batch."""
        self.job.add(step)

    def finish(self) -> None:
        """Compute over all tars and write."""
        _end(self.job, self.present, True)

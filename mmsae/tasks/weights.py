"""``mmsae weights``: cross-modal weights of an SAE on a vision-language host, from shards, tar by tar.

One tar is one unit of work with one part file, so a killed job goes on where it stopped; the parts are merged in order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmsae.backbones import Backbone, load_backbone
from mmsae.files import atomic_file
from mmsae.metrics.cross_modal import CrossModalWeights
from mmsae.metrics.modality import CoActivation
from mmsae.sae import SAE
from mmsae.shards import FAULT_LIMIT, FaultLog, Sample, count_samples, expand, part_path, run_units, unit_batches, units
from mmsae.tasks.sae_v import encode_tokens, sae_fingerprint, segment_sites
from mmsae.tasks.weights_file import CFG, load_weights, save_weights
from mmsae.types import Faults, ImageTextBatch, InputError, Tokens

TextChoice = Literal["question", "question+answer"]
JOB, PARTS = "job.json", "parts"


class Subset:
    """A host's collate that keeps a share of the samples, chosen by a hash of their uid.

    Args:
        collate: The host's.
        share: Of the samples, 0 to 1.
        seed: Of the choice.
    """

    def __init__(self, collate: Any, share: float, seed: int = 0):
        self.collate, self.share, self.seed = collate, share, seed

    def __call__(self, samples: Sequence[Sample]) -> ImageTextBatch:
        """A batch of those that are kept; without inputs where there are none."""
        kept = [s for s in samples if self.keeps(s.uid)]
        return self.collate(kept) if kept else ImageTextBatch(None, None, [], [], [], [])

    def keeps(self, uid: str) -> bool:
        """Whether a sample is in the subset."""
        digest = blake2b(f"{self.seed}\0{uid}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64


class Evidence(nn.Module):
    """The two streaming metrics that make up a weights file.

    Args:
        d_sae: Number of latents.
        width: Of the hidden vectors.
        **definition: Of :class:`~mmsae.metrics.cross_modal.CrossModalWeights`.
    """

    def __init__(self, d_sae: int, width: int, **definition: Any):
        super().__init__()
        self.weights = CrossModalWeights(d_sae, width, **definition)
        self.lift = CoActivation(d_sae, self.weights.delta)

    def update(self, sae: SAE, tokens: Tokens) -> None:
        """Add one batch."""
        codes = encode_tokens(sae, tokens)
        self.weights.update(codes, tokens)
        self.lift.update(codes, tokens)

    def save(self, path: Path, faults: Faults) -> None:
        """Write what was seen to a part file."""
        tensors = {f"weights.{k}": v for k, v in self.weights.part().items()}
        tensors |= {f"lift.{k}": v for k, v in self.lift.part().items()}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path, {"faults": json.dumps(faults)})

    def merge(self, path: Path) -> None:
        """Add a part file."""
        tensors = load_file(path)
        for name, metric in (("weights.", self.weights), ("lift.", self.lift)):
            metric.merge({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})


def _faults(path: Path) -> Faults:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        seen, counts, examples = json.loads(f.metadata()["faults"])
    return Faults(seen, counts, tuple(map(tuple, examples)))


@torch.no_grad()
def weights(
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
    progress: bool = True,
) -> dict[str, Any]:
    """Cross-modal weights of every latent: are its strongest text and image tokens alike?

    Run again after a kill, it goes on; run again after it ended, it does nothing.

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
        progress: Whether to show bars and print.

    Returns:
        ``weights.json``, with the folder as ``out``.
    """
    model = SAE.from_pretrained(sae)
    name = host or next((s.hint for s in model.sites.values() if s.hint), "")
    if not name:
        raise InputError(f"SAE {sae} names no host: give --host")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    backbone = load_backbone(name, device=device, precision=precision)
    definition = {"mode": mode, "selection": selection, "n_pool": n_pool, "n_side": n_side, "delta": delta}
    definition |= {"delta_quantile": delta_quantile, "center": center}
    return cross_modal_weights(
        backbone, model.to(device), shards, out, text=text, definition=definition, samples=samples,
        batch_size=batch_size, workers=workers, seed=seed, fault_limit=fault_limit, allow_other_site=allow_other_site,
        progress=progress,
    )  # fmt: skip


@torch.no_grad()
def cross_modal_weights(
    host: Backbone,
    sae: SAE,
    shards: str | Sequence[str],
    out: str | Path,
    *,
    text: TextChoice = "question",
    definition: dict[str, Any] | None = None,
    samples: int | None = 1000,
    batch_size: int = 8,
    workers: int = 0,
    seed: int = 0,
    fault_limit: float = FAULT_LIMIT,
    allow_other_site: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """:func:`weights` with a host and an SAE that are loaded; ``definition`` are arguments of the metric.

    Raises:
        InputError: Another job in the folder, an SAE of another site, or too many unusable samples.
    """
    paths, out = expand(shards), Path(out)
    evidence = Evidence(sae.d_sae, next(iter(sae.d_in.values())), **(definition or {})).to(host.device)
    sites = segment_sites(sae, host, allow_other_site)
    job = {
        "sae": sae_fingerprint(sae),
        "host": host.fingerprint,
        "hint": host.hint,
        "sites": {m: s.to_dict() for m, s in sites.items()},
        "definition": evidence.weights.config(),
        "text": text,
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        "data": [[Path(p).name, Path(p).stat().st_size] for p in paths],
    }
    if (out / CFG).exists():
        _same_job(job, load_weights(out).info, out / CFG)
        if progress:
            print(f"{out}: finished before; nothing to do")
        return {**load_weights(out).info, "out": str(out)}
    parts = out / PARTS
    if (out / JOB).exists():
        _same_job(job, json.loads((out / JOB).read_text()), out / JOB)
    with atomic_file(out / JOB) as temp:
        temp.write_text(json.dumps(job, indent=2) + "\n")
    parts.mkdir(parents=True, exist_ok=True)
    share = 1.0 if samples is None else min(1.0, samples / max(1, sum(count_samples(p) for p in paths)))
    collate = Subset(host.collator(text), share, seed)
    if progress:
        print(
            f"cross-modal weights of {sae.d_sae} latents at {next(iter(sites.values()))}, "
            f"from about {share:.0%} of the samples of {len(paths)} shards"
        )

    def work(path: str) -> Any:
        evidence.weights.reset()
        evidence.lift.reset()
        log = FaultLog()
        with closing(unit_batches([path], None, None, batch_size, workers=workers, collate=collate)) as stream:
            for step in stream:
                log.merge(step.batch.faults)
                if step.batch.uids:
                    evidence.update(sae, host.capture(step.batch, sites))
        faults = log.take()
        return lambda temp: evidence.save(temp, faults)

    run_units(paths, parts, work, progress=progress, desc="weights")
    log = FaultLog()
    evidence.weights.reset()
    evidence.lift.reset()
    for unit in units(paths):
        part = part_path(parts, unit)
        log.merge(_faults(part))
        evidence.merge(part)
    log.check(fault_limit, final=True)
    save_weights(out, evidence.weights.compute(), evidence.lift.compute(), {**job, "faults": log.to_dict()})
    shutil.rmtree(parts, ignore_errors=True)
    found = load_weights(out).info
    if progress:
        print(log.summary())
        print(f"{found['weighted']} latents have a weight ({found['coverage']:.0%} of those that fire)")
    return {**found, "out": str(out)}


def _same_job(job: dict[str, Any], old: dict[str, Any], file: Path) -> None:
    for key, value in json.loads(json.dumps(job)).items():
        if key != "hint" and old.get(key) != value:
            raise InputError(f"{file} is of another job: its {key} is {old.get(key)}, not {value}; give another --out")


class LitWeights(pl.LightningModule):
    """The same measure for ``Trainer.predict``: an SAE and the metrics, summed over ranks and written at the end.

    Args:
        sae: SAE folder.
        host: Name of the host.
        out: Folder to write.
        definition: Arguments of :class:`~mmsae.metrics.cross_modal.CrossModalWeights`.
        allow_other_site: Accept an SAE that was trained on another host.
    """

    def __init__(
        self,
        sae: str,
        host: str,
        out: str,
        definition: dict[str, Any] | None = None,
        allow_other_site: bool = False,
    ):
        super().__init__()
        self.folder, self.name, self.out = sae, host, out
        self.definition, self.allow_other_site = definition or {}, allow_other_site
        self.evidence: Evidence | None = None

    def setup(self, stage: str) -> None:
        """Load SAE and host."""
        self.sae = SAE.from_pretrained(self.folder)
        self.host = [load_backbone(self.name, device=self.device)]  # in a list: no submodule, in no checkpoint
        self.sites = segment_sites(self.sae, self.host[0], self.allow_other_site)
        self.evidence = Evidence(self.sae.d_sae, next(iter(self.sae.d_in.values())), **self.definition)

    def predict_step(self, batch: ImageTextBatch | Tokens, batch_idx: int) -> None:
        """Add a batch of the host's collate, or its activations."""
        tokens = batch if isinstance(batch, Tokens) else self.host[0].capture(batch, self.sites)
        self.evidence.update(self.sae, tokens)

    def on_predict_epoch_end(self) -> None:
        """Compute over all ranks; rank 0 writes."""
        found, lift = self.evidence.weights.compute(), self.evidence.lift.compute()
        info = {"sae": sae_fingerprint(self.sae), "host": self.host[0].fingerprint, "hint": self.host[0].hint}
        info |= {"sites": {m: s.to_dict() for m, s in self.sites.items()}}
        if self.trainer.is_global_zero:
            save_weights(self.out, found, lift, {**info, "definition": self.evidence.weights.config()})

"""The artefact of ``mmsae weights``: a safetensors file with a JSON beside it that says whose weights they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsae.metrics.concepts.evidence import TopTable, pack_uids, unpack_uids
from mmsae.metrics.pairs.cross_modal import CrossModal
from mmsae.metrics.pairs.modality import CLASSES, Lift, modality_class, modality_index
from mmsae.sae import SAE
from mmsae.sae.fingerprint import is_of, sae_fingerprint
from mmsae.types import IMAGE, TEXT, InputError

FORMAT = 1
CFG, TENSORS, TOKENS = "weights.json", "latent_weights.safetensors", "top_tokens.parquet"
BEFORE = "weights.safetensors"  # the name of TENSORS up to version 0.2


class CrossModalFile(NamedTuple):
    """Cross-modal weights as they are stored."""

    weights: Tensor  #: ``(d_sae,)`` float64; NaN where there is not enough evidence.
    delta: float  #: Bound that evidence had to exceed, and above which a latent is active in scores.
    #: Everything else per latent: ``evidence.*``, ``fired.*``, ``energy.*``, ``index.firing``, ``index.energy``,
    #: ``class``, ``lift``, ``lift.p``, ``pairs.*``.
    tensors: dict[str, Tensor]
    info: dict[str, Any]  #: ``weights.json``.

    def check(self, sae: SAE, host: str) -> None:
        """Refuse weights of another SAE or host, which is given by its fingerprint.

        Raises:
            InputError: With the two fingerprints that disagree.
        """
        for name, own in (("sae", sae_fingerprint(sae)), ("host", host)):
            if self.info[name] != own and not (name == "sae" and is_of(sae, self.info[name])):
                raise InputError(
                    f"these cross-modal weights belong to {name} {self.info[name][:12]}, not to {own[:12]}: "
                    "weights mean nothing on another SAE, layer or model; run mmsae weights"
                )


def save_weights(
    folder: Path, found: CrossModal, lift: Lift, info: dict[str, Any], top: Mapping[str, TopTable]
) -> None:
    """Write the files into a folder; ``info`` names the SAE, host, site, data and definition."""
    rate = {m: found.fired[m].double() / max(found.tokens[m], 1) for m in (IMAGE, TEXT)}
    mean = {m: found.energy[m] / max(found.tokens[m], 1) for m in (IMAGE, TEXT)}
    index = modality_index(rate[IMAGE], rate[TEXT])
    kinds = modality_class(index)
    tensors = {"weights": found.weights, "index.firing": index, "class": kinds}
    tensors |= {"index.energy": modality_index(mean[IMAGE], mean[TEXT]), "lift": lift.lift, "lift.p": lift.p}
    for m in (IMAGE, TEXT):
        tensors |= {f"evidence.{m}": found.evidence[m], f"fired.{m}": found.fired[m], f"energy.{m}": found.energy[m]}
    tensors |= {"pairs.both": lift.both, "pairs.image": lift.image, "pairs.text": lift.text}
    weighted = found.weights[found.weights.isfinite()]
    report = {
        "format": FORMAT,
        **info,
        "delta": found.delta,
        "coverage": found.coverage,
        "weighted": len(weighted),
        "mean_weight": weighted.mean().item() if len(weighted) else None,
        "tokens": found.tokens,
        "pairs": lift.items,
        "classes": dict(zip(CLASSES, torch.bincount(kinds, minlength=len(CLASSES)).tolist(), strict=True)),
        **lift.summary(kinds == CLASSES.index("shared")),
    }
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / TENSORS)
    (folder / CFG).write_text(json.dumps(report, indent=2) + "\n")
    save_top(folder / TOKENS, top, [name for name, _ in info["data"]])


def save_top(path: Path, top: Mapping[str, TopTable], tars: Sequence[str]) -> None:
    """``top_tokens.parquet``: latent, modality, rank, value, uid, position in the sequence, shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for m, t in top.items():
        latent, rank = (v.cpu() for v in (t.values != 0).nonzero(as_tuple=True))
        position, tar = t.extra.cpu()[latent, rank].unbind(1)
        columns = {"latent": latent.int().numpy(), "modality": [m] * len(latent), "rank": rank.int().numpy()}
        columns |= {"value": t.values.cpu()[latent, rank].numpy(), "uid": unpack_uids(t.ids.cpu()[latent, rank])}
        columns |= {"position": position.int().numpy(), "shard": [tars[i] for i in tar.tolist()]}
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), path, compression="zstd")


def tensors_of(folder: str | Path) -> Path:
    """The safetensors file of a folder; an older version called it otherwise."""
    return next((p for name in (TENSORS, BEFORE) if (p := Path(folder) / name).exists()), Path(folder) / TENSORS)


def load_weights(folder: str | Path) -> CrossModalFile:
    """Read what :func:`save_weights` wrote.

    Raises:
        InputError: No such folder, a newer format, or a broken file.
    """
    folder = Path(folder)
    try:
        info, tensors = json.loads((folder / CFG).read_text()), load_file(tensors_of(folder))
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(
            f"no cross-modal weights in {folder}: expected {CFG} and {TENSORS} ({type(e).__name__})"
        ) from e
    if info["format"] > FORMAT:
        raise InputError(f"{folder / CFG} has format {info['format']}; this version reads up to {FORMAT}")
    return CrossModalFile(tensors.pop("weights"), info["delta"], tensors, info)


def load_top(folder: str | Path, d_sae: int, tars: Sequence[str]) -> dict[str, TopTable]:
    """The strongest tokens that :func:`save_top` wrote, as tables; how often latents fired is not among them.

    Raises:
        InputError: No such file.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = Path(folder) / TOKENS
    try:
        rows = pq.read_table(path)
    except OSError as e:
        raise InputError(f"{path} cannot be read: it was written by no mmsae weights, or by an old one") from e
    number, out = {name: i for i, name in enumerate(tars)}, {}
    width = 1 + max(rows["rank"].to_pylist(), default=0)
    for m in (IMAGE, TEXT):
        own = rows.filter(pc.equal(rows["modality"], m))
        latent, rank = (torch.tensor(own[c].to_pylist(), dtype=torch.long) for c in ("latent", "rank"))
        place = zip(own["position"].to_pylist(), own["shard"].to_pylist(), strict=True)
        values, ids = torch.zeros(d_sae, width), torch.zeros(d_sae, width, 2, dtype=torch.long)
        extra, none = torch.zeros(d_sae, width, 2, dtype=torch.long), torch.zeros(d_sae, dtype=torch.long)
        values[latent, rank] = torch.tensor(own["value"].to_pylist())
        ids[latent, rank] = pack_uids(own["uid"].to_pylist())
        extra[latent, rank] = torch.tensor([[i, number[tar]] for i, tar in place], dtype=torch.long).reshape(-1, 2)
        out[m] = TopTable(values, ids, none, none.double(), 0, extra)
    return out

"""What is fitted for pair scores on a sample of pairs: correlations, means, the calibrator, names of concepts.

One safetensors file and a JSON of the same name beside it, which says of which SAE, host, sites and data it is.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmsae.files import atomic_file, write_json
from mmsae.filtering.calibrate import Calibrator, fit_calibrator
from mmsae.metrics.concepts.evidence import text_keys, top_evidence
from mmsae.metrics.concepts.names import LatentName
from mmsae.metrics.concepts.ngrams import FUNCTION_WORDS, WORD
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.types import IMAGE, TEXT, Codes, InputError

FORMAT, FILE = 1, "pair_weights.safetensors"
SHOWN = 3  # captions kept per concept


class Concept(NamedTuple):
    """How to call a latent until it has a name."""

    label: str  #: The words that its top captions share and others do not, or its first caption.
    captions: list[str]  #: Its top captions (those of its top images where it never fires on text).
    by: str = ""  #: Where a given name comes from and how well it holds; empty: the label is words of the captions.


class PairWeights(NamedTuple):
    """Everything fitted."""

    scorer: PairScorer  #: Correlations and means.
    concepts: dict[int, Concept]  #: ``{latent: concept}`` of the latents that fired.
    about: dict[str, Any]  #: Fingerprints of SAE, host, sites and data, sizes and seed.
    calibrator: Calibrator | None = None  #: Only where a clean calibration set was named.

    def to(self, device: torch.device | str) -> PairWeights:
        """The same on another device."""
        scorer = PairScorer(*(t.to(device) for t in self.scorer))
        calibrator = self.calibrator and Calibrator(*(t.to(device) for t in self.calibrator))
        return self._replace(scorer=scorer, calibrator=calibrator)

    def label(self, latent: int) -> str:
        """``#12 red circle``."""
        concept = self.concepts.get(latent)
        return f"#{latent} {concept.label}" if concept else f"#{latent}"

    def save(self, path: str | Path) -> Path:
        """Write ``path`` (safetensors) and its JSON, each whole or not at all."""
        path = Path(path)
        tensors = self.scorer._asdict()
        if self.calibrator is not None:
            tensors |= {f"calibrator.{k}": v for k, v in self.calibrator._asdict().items()}
        concepts = {str(j): c._asdict() for j, c in sorted(self.concepts.items())}
        with atomic_file(path) as temp:
            temp.write_bytes(save({k: v.cpu().contiguous() for k, v in tensors.items()}))
        write_json(path.with_suffix(".json"), {"format": FORMAT, **self.about, "concepts": concepts})
        return path

    @classmethod
    def load(cls, path: str | Path) -> PairWeights:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: Not such a file, or of a newer format.
        """
        path = Path(path)
        try:
            tensors = load_file(path)
            about = json.loads(path.with_suffix(".json").read_text())
            found = about.pop("format")
            if found > FORMAT:
                raise InputError(f"{path} has weights of format {found}; this version reads up to {FORMAT}")
            concepts = {int(j): Concept(**c) for j, c in about.pop("concepts").items()}
            scorer = PairScorer(*(tensors[f] for f in PairScorer._fields))
        except InputError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{path} and its .json are not weights of pair scores: {e}") from e
        calibrator = None
        if "calibrator.product" in tensors:
            calibrator = Calibrator(*(tensors[f"calibrator.{f}"] for f in Calibrator._fields))
        return cls(scorer, concepts, about, calibrator)

    def check(self, path: str | Path, about: Mapping[str, Any]) -> None:
        """Refuse weights that were fitted for another SAE, host or site.

        Raises:
            InputError: Names the field and the two values.
        """
        for field in ("sae", "host", "sites"):
            if self.about.get(field) != about[field]:
                raise InputError(
                    f"{path} was fitted for {field} {self.about.get(field)}, and this job has {about[field]}"
                )


def take_old(path: Path) -> None:
    """Call what an unfinished job of an earlier version has fitted as it is called today."""
    for suffix in (".safetensors", ".json"):
        if (old := path.with_name(f"weights{suffix}")).exists():
            os.replace(old, path.with_suffix(suffix))


class FitSample(NamedTuple):
    """A sample of pairs."""

    codes: dict[str, Codes]  #: ``{modality: codes of N rows}``.
    x: dict[str, Tensor]  #: ``{modality: (N, d)}`` embeddings in the joint space.
    uids: list[str]  #: The N ids.
    captions: list[str]  #: The N captions.

    def to_bytes(self, faults: Any) -> bytes:
        """The content of a part file."""
        tensors = {f"x.{m}": v for m, v in self.x.items()}
        for m, c in self.codes.items():
            tensors[f"values.{m}"] = c.values
            if c.indices is not None:
                tensors[f"indices.{m}"] = c.indices.int()
        meta = {"uids": self.uids, "captions": self.captions, "faults": faults, "d_sae": self.codes[IMAGE].d_sae}
        return save({k: v.contiguous() for k, v in tensors.items()}, {"mmsae": json.dumps(meta)})

    @classmethod
    def read(cls, paths: Sequence[Path]) -> tuple[FitSample, list[Any]]:
        """The sample in several part files, in their order, and the faults of each."""
        from safetensors import safe_open

        metas, parts = [], []
        for path in paths:
            with safe_open(path, "pt") as f:
                metas.append(json.loads(f.metadata()["mmsae"]))
                parts.append({k: f.get_tensor(k) for k in f.keys()})
        full = [p for p, meta in zip(parts, metas, strict=True) if meta["uids"]]
        if not full:
            wrong: Counter = sum((Counter(meta["faults"]["counts"]) for meta in metas), Counter())
            why = ", ".join(f"{kind} {n}" for kind, n in wrong.most_common()) or "no samples"
            raise InputError(f"no usable pair in the {len(paths)} shards that weights are fitted on: {why}")
        d_sae, codes = max(meta["d_sae"] for meta in metas), {}
        for m in (IMAGE, TEXT):
            ids = [p[f"indices.{m}"].long() if f"indices.{m}" in p else None for p in full]
            codes[m] = Codes.stack([Codes(p[f"values.{m}"], i, d_sae, m) for p, i in zip(full, ids, strict=True)])
        x = {m: torch.cat([p[f"x.{m}"] for p in full]) for m in (IMAGE, TEXT) if f"x.{m}" in full[0]}
        uids, captions = ([v for meta in metas for v in meta[f]] for f in ("uids", "captions"))
        return cls(codes, x, uids, captions), [meta["faults"] for meta in metas]


def fit_weights(
    sample: FitSample,
    about: Mapping[str, Any],
    *,
    calibrate: bool,
    seed: int,
    names: Mapping[int, LatentName] | None = None,
) -> PairWeights:
    """Fit everything on a sample of pairs, which must be clean if it is to ``calibrate`` (``pair_calibrated``).

    ``about`` says where the pairs come from, ``seed`` is that of the calibrator's mismatched pairs.
    """
    scorer = PairScorer.fit(sample.codes[IMAGE], sample.codes[TEXT], sample.x[IMAGE], sample.x[TEXT])
    calibrator = None
    if calibrate:
        cosines = [scorer.embeddings, sample.x[IMAGE], sample.x[TEXT]]
        calibrator = fit_calibrator(sample.codes[IMAGE], sample.codes[TEXT], *cosines, sample.captions, seed)
    return PairWeights(scorer, name_concepts(sample, names or {}), {**about, "pairs": len(sample.uids)}, calibrator)


def name_concepts(sample: FitSample, names: Mapping[int, LatentName], top: int = 12) -> dict[int, Concept]:
    """What to call each latent that fires on the sample, by its top captions (or those of its top images)."""
    keys, caption = text_keys(sample.captions), dict(zip(sample.uids, sample.captions, strict=True))
    tables = {m: top_evidence(c, sample.uids, top, keys) for m, c in sample.codes.items()}
    unique = sorted(set(sample.captions))
    common = Counter(w for c in unique for w in set(WORD.findall(c.lower())))
    out = {}
    for j in range(sample.codes[IMAGE].d_sae):
        captions = [caption[uid] for uid, _ in tables[TEXT].top(j) or tables[IMAGE].top(j)]
        if captions:
            name = names.get(j)
            given = (name.name, name.provenance()) if name and name.name else None
            label, by = given or (shared_words(captions, common, len(unique)), "")
            out[j] = Concept(label, captions[:SHOWN], by)
    return out


def shared_words(captions: Sequence[str], common: Mapping[str, int], n: int, most: int = 3) -> str:
    """The words that most of these captions have and few of all others; the first caption where there is none.

    ``common`` is ``{word: captions that have it}`` of all ``n`` different captions; ``most`` words are returned.
    """
    here = Counter(w for c in captions for w in set(WORD.findall(c.lower())))
    gain = {}
    for word, count in here.items():
        share, lift = count / len(captions), count / len(captions) / (common[word] / n)
        if share >= 0.6 and lift >= 1.5:
            gain[word] = share * math.log(lift)
    first = captions[0].lower().split()
    telling = {w: g for w, g in gain.items() if w not in FUNCTION_WORDS} or gain
    chosen = sorted(telling, key=lambda w: (-telling[w], w))[:most]
    chosen.sort(key=lambda w: first.index(w) if w in first else len(first))  # in the order of speech
    text = " ".join(chosen) or captions[0]
    return text if len(text) <= 60 else text[:57] + "..."

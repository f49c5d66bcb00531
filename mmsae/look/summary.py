"""What a look found, in figures beside those of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmsae.evaluation.card.top_images import SAME, TOP
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.guesses import FOLDER
from mmsae.metrics.concepts.names import FILE, read_names


def one_class(top: np.ndarray, label: np.ndarray) -> tuple[int, int]:
    """Latents of whose :data:`TOP` strongest items ``top (d_sae, n)`` at least :data:`SAME` are of one class, and
    how many classes such latents have; ``label (n_items,)`` are numbers, -1 for none.
    """
    whole = top[:, :TOP]
    own = np.sort(label[whole[(whole >= 0).all(1)]], axis=1) if whole.shape[1] == TOP else np.empty((0, TOP), int)
    first, last = own[:, : TOP - SAME + 1], own[:, SAME - 1 :]
    same = (first == last) & (first >= 0)  # they are sorted: a run of equal ones has equal ends
    return int(same.any(1).sum()), len(np.unique(first[same]))


def summary(evidence: Path) -> dict[str, Any]:
    """Counts of a folder of evidence of images: latents, names that hold, latents whose strongest images are of one
    class.

    ``one_class`` and ``classes`` are there where images have classes.
    """
    ev, out = Evidence(evidence), {}
    out["latents"], out["images"] = ev.d_sae, ev.n
    if (names := evidence / FOLDER / FILE).exists():
        out["named"] = sum(n.name is not None for n in read_names(names).values())
    if len(set(ev.items.label) - {""}) > 1:
        known, label = np.unique(ev.items.label, return_inverse=True)
        label = np.where(known[label] == "", -1, label)
        out["one_class"], out["classes"] = one_class(ev.top("image").item, label)
        out["of_classes"] = len(set(ev.items.label) - {""})
    return out


def sentence(found: dict[str, Any], control: dict[str, Any] | None) -> str:
    """The counts in words, those of random weights behind them."""

    def with_control(key: str) -> str:
        return f"{found[key]:,}" + (f" ({control[key]:,})" if control else "")

    beside = "; in brackets, of random weights" if control else ""
    said = [f"{found['latents']:,} latents of {found['images']:,} photographs{beside}"]
    if "named" in found:
        said.append(f"{with_control('named')} have a name that holds on photographs that it was not made of")
    if "one_class" in found:
        said.append(
            f"of {with_control('one_class')} at least {SAME} of the {TOP} strongest photographs lie in one folder, "
            f"{with_control('classes')} of {found['of_classes']} folders"
        )
    return "\n  ".join(said)

"""Browsers to try: a small one of planted evidence, and reading what its scripts hold."""

import base64
import json

import numpy as np

from mmsae.interpret.browser.command import explore
from mmsae.metrics.concepts.names import LatentName, write_names
from tests.helpers.evidence import write_evidence

SAE = "s" * 32
HOSTILE = [
    '<script>document.title="owned"</script>', '"><img src=x onerror=document.title="owned">', "</script><b>bold</b>",
    "a \u2028 line \u2029 and \\ `${1}`", "javascript:alert(1)", "&lt;already&gt; & 'quoted'",
]  # fmt: skip


def planted(folder, n=60, d_sae=24, captions=True, images=True, seed=0, **of):
    """Evidence in which latent j < 12 fires in image and text of items with ``i % 12 == j``, 12 to 17 in images, 18 to
    21 in texts and the others never; grid 4 x 4, captions of which the first are hostile.
    """
    rng = np.random.default_rng(seed)
    z = {"image": np.zeros((n, 16, d_sae)), "text": np.zeros((n, 5, d_sae))}
    for j in range(22):
        on = np.arange(n) % 12 == j if j < 12 else rng.random(n) < 0.3
        for m in ("image", "text"):
            if (m == "image" and j < 18) or (m == "text" and not 12 <= j < 18):
                places = z[m].shape[1]
                z[m][on, :, j] = rng.random((on.sum(), places)) * (rng.random((on.sum(), places)) < 0.4) + 0
                z[m][on, rng.integers(places, size=on.sum()), j] = 1 + rng.random(on.sum())
    said = [f"word{i % 12} number {i}" for i in range(n)]
    said[: len(HOSTILE)] = [f"{h} word{i}" for i, h in enumerate(HOSTILE)]
    pictures = (rng.random((n, 12, 16, 3)) * 255).astype(np.uint8) if images else None
    write_evidence(folder, z, captions=said if captions else None, images=pictures, grid={"image": (4, 4)},
                   labels=[f"class {i % 12}" for i in range(n)], seed=seed, **{"sae": SAE, **of})  # fmt: skip
    return z


def browser(folder, names=True, **options):
    """A browser of planted evidence in ``folder/browser``, and the codes."""
    z = planted(folder / "evidence")
    if names:
        found = {
            0: LatentName("word zero", "captions", 1.0, auroc=0.9),
            1: LatentName(None, "captions", note="too weak"),
            2: LatentName(HOSTILE[1], "lvlm"),
        }
        write_names(folder / "evidence" / "names" / "names.json", found, SAE)
    explore(str(folder / "evidence"), out=str(folder / "browser"), progress=False, **options)
    return folder / "browser", z


def read(folder, key):
    """What the script of a key holds, with arrays in place of packed ones."""
    text = (folder / "data" / f"{key}.js").read_text(encoding="utf-8")
    head = f"mmsae.put({json.dumps(key)},"
    assert text.startswith(head) and text.endswith(");\n")
    return json.loads(text[len(head) : -3], object_hook=_array)


def _array(said):
    if set(said) == {"t", "s", "d"}:
        return np.frombuffer(base64.b64decode(said["d"]), said["t"].replace("f", "<f")).reshape(said["s"])
    return said

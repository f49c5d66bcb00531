"""The part of ``mmsae demo`` in which latents are looked at: evidence on held-out pairs, names, and the browser."""

from __future__ import annotations

from pathlib import Path

from mmsae.demo.stages import SEEDS

SHOWN, COMPARED, CONTROL = "paired_topk", "vl_sae", "random"
PAGE = "browser/index.html"


def collect(root: Path, seed: int, progress: bool = True) -> None:
    """Evidence of two SAEs and of random weights, on the held-out pairs."""
    from mmsae.interpret.evidence.job import collect_evidence
    from mmsae.options import SAERun
    from mmsae.sae import SAE, random_control

    random_control(SAE.from_pretrained(root / SHOWN / "sae"), seed).save_pretrained(root / CONTROL / "sae")
    names = (SHOWN, COMPARED, CONTROL)
    collect_evidence(
        [str(root / n / "sae") for n in names], str(root / "shards" / "test"), [evidence(root, n) for n in names],
        f"local-dir:{root / 'clip'}", run=SAERun("cpu", workers=0, progress=progress),
    )  # fmt: skip


def evidence(root: Path, name: str) -> Path:
    """The folder of the evidence of an SAE."""
    return root / name / "evidence"


def browse(root: Path, progress: bool = True) -> None:
    """Name latents by the captions and words of the world, and write the browser."""
    from mmsae.interpret.browser.command import explore
    from mmsae.interpret.browser.options import Display
    from mmsae.interpret.names.command import name
    from mmsae.options import call

    for sae in (SHOWN, COMPARED, CONTROL):
        call(
            name, str(evidence(root, sae)), vocabulary="captions", seed=SEEDS["train"], device="cpu", progress=progress
        )
    explore(
        str(evidence(root, SHOWN)), str(evidence(root, COMPARED)), str((root / PAGE).parent),
        sae=str(root / SHOWN / "sae"), other_sae=str(root / COMPARED / "sae"),
        control=str(evidence(root, CONTROL)), progress=progress, display=Display(title="the generated world"),
    )  # fmt: skip

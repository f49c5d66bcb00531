"""``mmsae explore``: a browser of latents and samples in a folder, for any web browser, without server or network."""

from __future__ import annotations

from typing import Any

from mmsae.interpret.browser.options import Display, Pages
from mmsae.interpret.evidence.options import Whereabouts


def explore(
    evidence: str,
    other: str = "",
    out: str = "",
    sae: str = "",
    other_sae: str = "",
    control: str = "",
    names: str = "",
    scores: str = "",
    progress: bool = True,
    display: Display = Display(),
    pages: Pages = Pages(),
    where: Whereabouts = Whereabouts(),
) -> dict[str, Any]:
    """Write a browser of an SAE's latents and of the samples that they fire on.

    Open ``index.html`` of the folder in any web browser; the folder can be moved, sent or put on a web server. Names
    and scores that lie in the evidence are shown with it.

    Args:
        evidence: What ``mmsae evidence`` wrote.
        other: Evidence of a second SAE, to compare with; on the same data, activations are compared, too.
        out: Folder to write. Default: ``browser`` beside the evidence.
        sae: SAE folder or hub id, for the map, neighbours by atoms and stability. Default: ``sae`` beside the evidence,
            if it is the same SAE.
        other_sae: The same of the second SAE.
        control: Evidence of a control, such as the SAE with random weights: shown in panels of its own, and marked.
        names: File of names. Default: ``names/names.json`` in the evidence.
        scores: Folder of scores. Default: ``scores`` in the evidence.
        progress: Whether to print what is done.
        display: What is shown.
        pages: What else there are pages of.
        where: Where the hosts of the evidence are, which read words for the search; likewise of other evidence on the
            same host.

    Returns:
        ``out``: the folder; ``bytes``: its size.

    Raises:
        InputError: No evidence, names of another SAE, or a folder that holds something else.
    """
    from pathlib import Path

    from mmsae.interpret.browser.site import Inputs, write_site

    folder = Path(out) if out else Path(evidence).resolve().parent / "browser"
    given = Inputs(evidence, sae, other, other_sae, control, names, scores, where)
    return write_site(folder, given, display, pages, progress)

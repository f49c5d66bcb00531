"""``mmsae analyse``: data sets by their concepts."""

from __future__ import annotations

from typing import Any, Literal

from mmsae.interpret.analyse.options import Analysing, Clustering, Correlating, Differing, Retrieving, Splitting


def analyse(
    task: Literal["diff", "correlate", "cluster", "retrieve"],
    evidence: list[str],
    out: str = "",
    analysing: Analysing = Analysing(),
    splitting: Splitting = Splitting(),
    differing: Differing = Differing(),
    correlating: Correlating = Correlating(),
    clustering: Clustering = Clustering(),
    retrieving: Retrieving = Retrieving(),
) -> dict[str, Any]:
    """Look at data sets by the concepts of an SAE.

    ``diff``: what two corpora differ in, with the false discovery rate and intervals; two folders of evidence, or one
    that ``split``, ``labels_a`` or ``uids`` splits. ``correlate``: which concepts go together, which of them
    surprisingly, and what images show and captions never say. ``cluster``: groups of items by some concepts, described
    by what distinguishes them. ``retrieve``: items by properties that they have and have not, beside dense retrieval,
    and how well where the truth is known.

    OUT holds analysis.json (the settings and the first results), a parquet file with all of them, and report.html with
    examples.

    Args:
        task: What to do.
        evidence: Folder of ``mmsae evidence``; for ``diff`` one or two, A and B.
        out: Folder of the result, which replaces that of an earlier analysis; default: EVIDENCE/analysis/TASK.
        analysing: What all of them read.
        splitting: Of ``diff``.
        differing: Of ``diff``.
        correlating: Of ``correlate``.
        clustering: Of ``cluster``.
        retrieving: Of ``retrieve``.

    Returns:
        What analysis.json holds, with the folder as ``out``.

    Raises:
        InputError: An argument or a folder is not usable; one sentence says why.
    """
    from mmsae.interpret.analyse import tasks

    options: dict[str, Any] = {
        "diff": (splitting, differing), "correlate": (correlating,), "cluster": (clustering,), "retrieve": (retrieving,)
    }  # fmt: skip
    return getattr(tasks, task)(evidence, out, analysing, *options[task])

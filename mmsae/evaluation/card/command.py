"""``mmsae evaluate``: the benchmark card of an SAE, from a suite of data and heads. One JSON file and one page."""

from __future__ import annotations

from pathlib import Path

from mmsae.errors import InputError
from mmsae.evaluation.options import Drawing, EvaluationRun, Foreign


def evaluate(
    sae: str,
    suite: str,
    out: str,
    host: str = "",
    root: str = "",
    heads: list[str] = [],  # noqa: B006  the help shows it; it is not changed
    quick: bool = False,
    controls: list[str] = [],  # noqa: B006
    seed: int = 0,
    drawing: Drawing = Drawing(),
    foreign: Foreign = Foreign(),
    run: EvaluationRun = EvaluationRun(),
) -> str:
    """Everything that applies of a suite, every figure with its controls and its number of samples.

    SAE may be a folder of SAEs, of mmsae or of any library that it reads: then each has a card in OUT/cards, and
    OUT/report.html and table.csv rank them beside random weights. Such a job goes on where it was stopped, and an SAE
    that cannot be scored is named at the end.

    Args:
        sae: Folder or hub id of the SAE, or a folder of several SAEs.
        suite: YAML file that says which data and which heads (configs/eval/world.yaml; docs/how-to/evaluate.md).
        out: Folder to write: results.json, tables.md and report.html. It appears when everything is done.
        host: Name of the host; default: the suite's, else that of the SAE's site.
        root: Folder that the suite's data paths are relative to; default: the suite's.
        heads: Only these heads of the suite.
        quick: At most 1,500 images a set, fewer probes and permutations.
        controls: SAEs that were trained as controls, as NAME=FOLDER (``model.freeze`` of a training makes them); every
            figure then stands beside theirs, too. Each takes as long as the SAE itself.
        seed: Seed of random weights, permutations and draws.
        drawing: The page of images.
        foreign: How SAEs of other libraries are read.
        run: How to compute.

    Returns:
        The path of the page.
    """
    from mmsae.evaluation.card.card import check_out
    from mmsae.evaluation.card.many import is_folder_of_saes
    from mmsae.evaluation.card.scoring import Scoring, asked_suite

    scoring = Scoring(asked_suite(suite, root, host, heads), quick, drawing, seed, foreign, run)
    if isinstance(sae, str) and is_folder_of_saes(sae):
        if controls:
            raise InputError(f"--controls are those of one SAE, and {sae} is a folder of several")
        if drawing.names:
            raise InputError(f"--names are those of one SAE, and {sae} is a folder of several")
        return str(scoring.all_in(Path(sae), Path(out)))
    folder = check_out(out)
    scoring.announce(folder)
    return str(scoring.one(sae, folder, controls))

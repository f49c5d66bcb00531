"""``mmsae evaluate``: the benchmark card of an SAE, from a suite of data and heads. One JSON file and one page."""

from __future__ import annotations

from dataclasses import replace

from mmsae.errors import InputError
from mmsae.evaluation.options import EvaluationRun
from mmsae.recipes import find_recipe


def evaluate(
    sae: str,
    suite: str,
    out: str,
    host: str = "",
    root: str = "",
    heads: list[str] = [],  # noqa: B006  the help shows it; it is not changed
    quick: bool = False,
    gallery: int = 0,
    controls: list[str] = [],  # noqa: B006
    seed: int = 0,
    run: EvaluationRun = EvaluationRun(),
) -> str:
    """Everything that applies of a suite, every figure with its controls and its number of samples.

    Args:
        sae: Folder or hub id of the SAE.
        suite: YAML file that says which data and which heads (configs/eval/world.yaml; docs/how-to/evaluate.md).
        out: Folder to write: results.json, tables.md and report.html. It appears when everything is done.
        host: Name of the host; default: the suite's, else that of the SAE's site.
        root: Folder that the suite's data paths are relative to; default: the suite's.
        heads: Only these heads of the suite.
        quick: At most 1,500 images a set, fewer probes and permutations.
        gallery: Write gallery.html, too: the training images that so many latents answer to most, of the purest and of
            any, with the place where they fire at token sites, and the same of random weights.
        controls: SAEs that were trained as controls, as NAME=FOLDER (``model.freeze`` of a training makes them); every
            figure then stands beside theirs, too. Each takes as long as the SAE itself.
        seed: Seed of random weights, permutations and draws.
        run: How to compute.

    Returns:
        The path of the page.
    """
    from mmsae.evaluation.card.card import check_control, check_files, check_out, run_card
    from mmsae.evaluation.card.gallery import check_host
    from mmsae.evaluation.suite import load_suite
    from mmsae.evaluation.suite_data import SuiteData
    from mmsae.load import load_pair, other_host_warnings
    from mmsae.sae import SAE

    folder = check_out(out)
    if gallery < 0:
        raise InputError(f"--gallery is {gallery}, it must be a number of latents, or 0 for no page")
    asked = load_suite(find_recipe(suite), root, host)
    if heads:
        if odd := [h for h in heads if h not in asked.heads]:
            raise InputError(f"{suite} has no head {odd[0]}, it has {', '.join(asked.heads)}")
        asked = replace(asked, heads={h: asked.heads[h] for h in heads})
    else:
        check_files(asked)
    if run.progress:
        images = "at most 1,500 images a set" if quick else "all images that the suite asks for"
        what = f"{len(asked.heads)} heads" if len(asked.heads) > 1 else "one head"
        print(f"mmsae evaluate: {what} on {', '.join(asked.data)}, {images}; to {folder}", flush=True)
    trained = SAE.from_pretrained(sae) if isinstance(sae, str) else sae
    model, loaded = load_pair(trained, asked.host, run.device, run.precision, run.allow_other_site)
    if gallery:
        check_host(loaded)
    others = {}
    for text in controls:
        name, sep, path = text.partition("=")
        if not sep or name in others:
            raise InputError(f"--controls takes NAME=FOLDER, each name once, not {text!r}")
        others[name] = load_pair(path, loaded, allow_other_site=run.allow_other_site)[0]
        check_control(name, others[name], model)
    data = SuiteData(asked, model, loaded, run, quick, seed)
    return str(run_card(data, folder, str(sae), gallery, other_host_warnings(trained, loaded), others))

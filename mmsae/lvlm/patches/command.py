"""``mmsae patches``: the patch filter over shards, tar by tar, with a table and a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmsae.files import atomic_file
from mmsae.hosts import load_host, named_host, parse, pick_device
from mmsae.jobs import Parts
from mmsae.lvlm.hallucination.answers import at_least_one, same_job
from mmsae.lvlm.patches.patch_filter import ALL, SCORES, PatchFilter
from mmsae.lvlm.tokens import no_lvlm, segment_sites
from mmsae.lvlm.weights.file import load_weights
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FAULT_LIMIT, FaultLog, expand, identity, read_shard, with_image
from mmsae.types import InputError


def patches(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str | None = None,
    weights: str | None = None,
    scores: list[str] = list(SCORES),  # noqa: B006  jsonargparse shows it in the help; it is not changed
    keep: list[float] = [0.75, 0.5, 0.25],  # noqa: B006
    answers: list[str] = [],  # noqa: B006
    samples: int | None = None,
    max_new_tokens: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    fault_limit: float = FAULT_LIMIT,
    allow_other_site: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Black out the patches with the lowest scores and ask again: which score knows what the model needs?

    Args:
        sae: SAE folder or hub id, trained on image and text tokens of a vision-language model.
        shards: Pictures with ``question`` and ``answer`` in their json.
        out: Folder to write: results.json and patches.png. The same command goes on where it was stopped.
        host: Name of the host; default: the SAE's own.
        weights: Folder of ``mmsae weights``, needed for ``cos``.
        scores: Of patches: cos, l0, l1, co_l0; norm (of the state, without SAE) and random are controls.
        keep: Shares of the patches that stay.
        answers: Only samples with one of these answers; default: all that have one.
        samples: The first so many of every shard; null for all.
        max_new_tokens: Of an answer, which is right where it begins with json's.
        batch_size: Questions per batch.
        seed: Of random patches and of ties.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        fault_limit: Largest share of samples that may be unusable.
        allow_other_site: Accept an SAE that was trained on another host.
        progress: Whether to show bars and print.

    Returns:
        ``{arm: {"accuracy", "error"}}`` under ``table``, and the folder as ``out``.
    """
    at_least_one(batch_size=batch_size, max_new_tokens=max_new_tokens)
    unknown = [s for s in scores if s not in SCORES]
    if unknown or not scores:
        raise InputError(f"no score {unknown[0] if unknown else ''!r} of patches; there are {', '.join(SCORES)}")
    if any(not 0 < share <= 1 for share in keep):
        raise InputError(f"keep is {keep}; shares are above 0 and at most 1")
    model, paths = SAE.from_pretrained(sae), expand(shards)
    name = named_host(host, model.sites, f"SAE {sae}")
    if parse(name).kind != "lvlm":
        raise no_lvlm(name)
    if "cos" in scores and weights is None:
        raise InputError("score cos needs cross-modal weights: give --weights, the folder that mmsae weights wrote")
    device = pick_device(device)
    loaded = load_host(name, device=device, precision=precision)
    model = model.to(device).eval()
    file = None if weights is None else load_weights(weights)
    if file is not None:
        file.check(model, loaded.fingerprint)
    asker = PatchFilter(
        loaded, model, segment_sites(model, loaded, allow_other_site), file and file.weights,
        file.delta if file else 0.0, keep, scores, seed, max_new_tokens,
    )  # fmt: skip
    log, folder = FaultLog(), Path(out)

    def work(path: str) -> bytes:
        right: dict[str, list[bool]] = {}
        faults, chosen = FaultLog(), []
        for s in read_shard(path, faults, need=loaded.collate.need, decode=False):
            said = s.meta.get("answer")
            fits = said is not None and (not answers or str(said) in answers)
            if fits and (samples is None or len(chosen) < samples) and (s := with_image(s, faults)) is not None:
                chosen.append(s)
        for i in range(0, len(chosen), batch_size):
            for arm, hits in asker.ask(chosen[i : i + batch_size], faults).items():
                right.setdefault(arm, []).extend(hits)
        return json.dumps({"right": right, "faults": faults.to_dict()}).encode()

    job = {"sae": sae_fingerprint(model), "host": loaded.fingerprint, "scores": list(scores), "keep": list(keep)}
    job |= {"weights": None if file is None else file.info, "answers": list(answers), "samples": samples, "seed": seed}
    job |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    job |= {"shards": identity(paths)}
    with same_job(folder, job):
        parts = Parts(folder / "parts", paths).run(work, progress=progress, what="patches")
    right: dict[str, list[bool]] = {}
    for part in parts:
        found = json.loads(part.read_text())
        log.merge(FaultLog.from_dict(found["faults"]).take())
        for arm, hits in found["right"].items():
            right.setdefault(arm, []).extend(hits)
    log.check(fault_limit, final=True)
    if not right:
        raise InputError(f"no sample of {shards} has an answer{f' of {answers}' if answers else ''} in its json")
    n = len(right[ALL])
    table = {arm: {"accuracy": sum(h) / n, "error": _error(sum(h) / n, n)} for arm, h in right.items()}
    results = {"table": table, "questions": n, "keep": list(keep), "scores": list(scores), "host": loaded.hint}
    with atomic_file(folder / "results.json") as temp:
        temp.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, folder / "patches.png")
    if progress:
        print(markdown(results))
    return {**results, "out": str(folder)}


def _error(p: float, n: int) -> float:
    return math.sqrt(p * (1 - p) / n)


def markdown(results: dict[str, Any]) -> str:
    """Accuracy by score and share kept."""
    t = results["table"]
    rows = [[f"{k:.0%}", *(t[f"{s}/{k:g}"]["accuracy"] for s in results["scores"])] for k in results["keep"]]
    body = markdown_table(["kept", *results["scores"]], rows)
    return f"{body}\n\nall patches: {t[ALL]['accuracy']:.3f}, {results['questions']} questions"


def plot(results: dict[str, Any], path: Path) -> None:
    """The same as a picture, with standard errors."""
    from matplotlib.figure import Figure

    from mmsae.report.figures import write_png

    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax, t = fig.subplots(), results["table"]
    shares = [1.0, *sorted(results["keep"], reverse=True)]
    for name in results["scores"]:
        rows = [t[ALL], *(t[f"{name}/{k:g}"] for k in shares[1:])]
        style = {"ls": "--", "color": "0.4"} if name == "random" else {}
        ax.errorbar(shares, [r["accuracy"] for r in rows], [r["error"] for r in rows], label=name, capsize=2, **style)
    ax.invert_xaxis()
    ax.set(xlabel="share of patches kept", ylabel="accuracy")
    ax.legend(frameon=False)
    write_png(fig, path, dpi=130)

"""``mmsae score``: how well names of latents hold, beside names of others and random weights."""

from __future__ import annotations

from pathlib import Path

from mmsae.interpret.clients.options import Asking
from mmsae.interpret.evidence.options import Whereabouts
from mmsae.interpret.scores.options import Judging
from mmsae.options import OneProcessRun


def score(
    evidence: str,
    out: str = "",
    control: str = "",
    sae: str = "",
    control_sae: str = "",
    judging: Judging = Judging(),
    asking: Asking = Asking(),
    run: OneProcessRun = OneProcessRun(),
    where: Whereabouts = Whereabouts(),
) -> Path:
    """Score the names of latents on unseen items, offline, or by asking a model.

    The same scorers are used on shuffled names, or on items dealt to latents at random where a scorer shows no name,
    and, with a control, on latents of random weights. OUT holds
    scores.parquet (a row per latent, control and scorer, with chance level, number of outcomes and interval),
    scores.json (the means) and report.html. Answers of a model are kept: run again, it asks only what has none.

    Args:
        evidence: Folder that mmsae evidence wrote, in which mmsae name has been.
        out: Folder to write; default EVIDENCE/scores.
        control: Evidence of an SAE of random weights on the same data.
        sae: SAE folder or hub id, for the scorer intervention, which pushes its host along latents.
        control_sae: That of the control, for the same of its latents.
        judging: What is scored, and how.
        asking: Whom to ask.
        run: Where it is computed.
        where: Where the hosts of the evidence are, and of that of the control.

    Returns:
        The path of scores.json.

    Raises:
        InputError: Nothing can be scored, or a model cannot be asked; one sentence says why.
    """
    from mmsae.files import disk_errors
    from mmsae.interpret.clients.load import asked_client
    from mmsae.interpret.evidence.folder import Evidence
    from mmsae.interpret.scores.job import ScoreJob, write_scores
    from mmsae.interpret.scores.report import write_report
    from mmsae.interpret.scores.table import CONTROLS
    from mmsae.sae import SAE
    from mmsae.sae.fingerprint import sae_fingerprint
    from mmsae.types import InputError

    found, fresh = (SAE.from_pretrained(name) if name else None for name in (sae, control_sae))
    ev = Evidence(evidence, sae_fingerprint(found) if found else "", where=where)
    folder = Path(out) if out else ev.folder / "scores"
    say = (lambda said: print(f"score: {said}", flush=True)) if run.progress else lambda said: None
    with disk_errors(folder):
        asked = asked_client(asking, folder / "answers", run.device, run.precision)
        if fresh and not control:
            raise InputError("control_sae is given without its evidence: name that with --control")
        other = Evidence(control, sae_fingerprint(fresh) if fresh else "", where=where) if control else None
        job = ScoreJob(ev, other, judging, asked, asking.asked, run.device, found, fresh)
        rows, said, subjects = job.run(say)
        path = write_scores(folder, rows, said)
        if judging.report:
            write_report(folder, rows, said, subjects)
    if asked:
        say(asked.told)
    for r in said["summary"]:
        if r["which"] == "all":
            value = f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}], chance {r['chance']:.2f}"
            say(f"{r['scorer']}, {r['modality']}s, {CONTROLS[r['control']]}: {value}, {r['latents']:,} latents")
    for note in said["notes"]:
        say(note)
    for scorer, why in said["left_out"].items():
        say(f"without {scorer}: {why}")
    return path

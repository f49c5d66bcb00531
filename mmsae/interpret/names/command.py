"""``mmsae name``: what latents mean, in words, and how well that holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmsae.errors import InputError
from mmsae.interpret.clients.options import Asking
from mmsae.interpret.evidence.options import Whereabouts
from mmsae.interpret.names.options import Holding, Looking
from mmsae.options import OneProcessRun


def name(
    evidence: str,
    out: str = "",
    sae: str = "",
    control: str = "",
    looking: Looking = Looking(),
    holding: Holding = Holding(),
    asking: Asking = Asking(),
    run: OneProcessRun = OneProcessRun(),
    where: Whereabouts = Whereabouts(),
) -> Path:
    """Name latents by their evidence, with no model but the encoder of its embeddings, or by asking one.

    OUT holds names.json (every latent with its name or none, score, margin, z-score and AUROC on unseen items; filter,
    steer and the browser read it), candidates.parquet (all phrases that were tried) and about.json. Names are looked
    for on the train half of the evidence and judged on the test half.

    Args:
        evidence: Folder that mmsae evidence wrote.
        out: Folder to write; default EVIDENCE/names.
        sae: SAE folder or hub id, for the methods vocabulary (its atoms) and steering.
        control: Evidence of an SAE of random weights on the same data: a name holds if it does better than those that
            all but --false-names of its latents get, instead of by --min-auroc.
        looking: How names are looked for.
        holding: When a name holds.
        asking: Whom to ask for names, too; answers are kept in OUT/answers, a repeated command asks for the rest.
        run: Where it is computed.
        where: Where the hosts of the evidence are, and of that of the control.

    Returns:
        The path of names.json.

    Raises:
        InputError: No evidence, evidence of another SAE, or nothing to name by; one sentence says why.
    """
    from mmsae.files import disk_errors
    from mmsae.interpret.evidence.folder import Evidence
    from mmsae.interpret.guesses import FOLDER
    from mmsae.interpret.names.choose import fewest
    from mmsae.interpret.names.job import WITH_MODEL, WITHOUT_MODEL, Naming, check_control, write_named
    from mmsae.sae import SAE
    from mmsae.sae.fingerprint import sae_fingerprint

    found = SAE.from_pretrained(sae) if sae else None
    ev = Evidence(evidence, sae_fingerprint(found) if found else "", where=where)
    say = (lambda said: print(f"name: {said}", flush=True)) if run.progress else lambda said: None
    folder, spoken = Path(out) if out else ev.folder / FOLDER, []
    if not asking.client and (bad := [m for m in looking.methods if m in WITH_MODEL]):
        raise InputError(f"method {bad[0]} asks a model: name one with --client")
    with disk_errors(folder):
        naming, least = Naming(ev, looking, holding, found, run.device), None
        if control:
            # atoms of random weights are near to no word (of 128 latents one or none had a name by them)
            methods = tuple(m for m in looking.methods if m in WITHOUT_MODEL and m != "vocabulary")
            other = replace(looking, latents=(), methods=methods)
            random = check_control(ev, Evidence(control, where=where))
            null = Naming(random, other, holding, device=run.device, cache=False)
            least = null.least(lambda said: say(f"random weights: {said}"))
            for m, auroc in least.items():
                say(f"{holding.false_names:.0%} of latents of random weights reach an AUROC of {auroc:.3f} by {m}s")
            for m, latents in naming.latents.items():
                if len(latents) and m not in least:
                    naming.left_out[f"the control of {m}s"] = (
                        f"it has {len(null.latents.get(m, ()))} latents with evidence of {m}s alone, and a share of "
                        f"{holding.false_names:g} takes {fewest(holding.false_names)}: {len(latents)} names are held "
                        f"by --min-auroc {holding.min_auroc:g}"
                    )
        if asking.client:
            from mmsae.interpret.clients.load import asked_client
            from mmsae.interpret.names.spoken import spoken_candidates

            asked = asked_client(asking, folder / "answers", run.device, run.precision)
            spoken = spoken_candidates(naming, asked, asking.asked, run.progress)
            say(asked.told)
        named = naming.run(say, spoken, least)
        if asking.client:
            named.about["account"] = asked.account
        path = write_named(folder, named, ev.about["job"]["sae"])
    a = named.about
    if a["suggested"] < a["with_evidence"]:
        say(f"nothing was suggested for {a['with_evidence'] - a['suggested']:,} of the latents with evidence")
    say(f"{a['named']:,} of {a['with_evidence']:,} latents with evidence have a name that holds")
    for method, why in a["left_out"].items():
        say(f"without {method}: {why}")
    return path

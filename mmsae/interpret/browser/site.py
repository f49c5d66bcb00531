"""The folder of a browser: data of its panels, pages beside them, and the program that shows it all."""

from __future__ import annotations

import shutil
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.files import atomic_folder, check_writable, disk_errors, nbytes, refuse_foreign, remove_leftovers, write_json
from mmsae.interpret.attributes.file import read_attributes
from mmsae.interpret.browser.compare import match, write_match
from mmsae.interpret.browser.exports import write_lines, write_table
from mmsae.interpret.browser.files import put
from mmsae.interpret.browser.ontology import write_ontology
from mmsae.interpret.browser.options import Display, Pages
from mmsae.interpret.browser.panel import Panel, Source
from mmsae.interpret.browser.scores import read_scores
from mmsae.interpret.browser.steered import write_strips
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.options import Whereabouts
from mmsae.metrics.concepts.names import read_names
from mmsae.types import InputError

FORMAT, MARK = 1, "browser.json"
STATIC = Path(__file__).with_name("static")
SCRIPTS = (
    "vendor/minisearch.js", "core.js", "data.js", "notes.js", "parts.js", "heat.js", "areas.js", "scatter.js",
    "lists.js", "overview.js", "samples.js", "latent.js", "sample.js", "query.js", "compare.js", "intruder.js",
    "tree.js", "about.js", "main.js",
)  # fmt: skip


class Inputs(NamedTuple):
    """What a browser is made of, as the command line says it."""

    evidence: str  #: Folder of evidence
    sae: str = ""  #: SAE of it, empty: look for it
    other: str = ""  #: Evidence of a second SAE, or empty
    other_sae: str = ""  #: That SAE
    control: str = ""  #: Evidence of a control, or empty
    names: str = ""  #: File of names, empty: that of the evidence
    scores: str = ""  #: Folder of scores, empty: that of the evidence
    where: Whereabouts = Whereabouts()  #: Where the hosts of the evidence are, and of other evidence on the same host


def atoms_of(evidence: Evidence, sae: str) -> np.ndarray | None:
    """``(d_sae, d)`` atoms of the evidence's SAE, or None where it is neither named nor found.

    Raises:
        InputError: The SAE that is named is another.
    """
    said, beside = evidence.about["job"]["sae"], evidence.folder.resolve().parent / "sae"
    if not sae and not (beside / "cfg.json").exists():
        return None
    from mmsae.sae import SAE
    from mmsae.sae.fingerprint import is_of

    found = SAE.from_pretrained(sae or beside)
    if is_of(found, said):
        return next(iter(found.dictionaries.values())).rows().detach().float().numpy()
    if sae:
        raise InputError(f"{evidence.folder} is evidence of SAE {said[:12]}, and {sae} is another")
    return None


def sources(given: Inputs) -> list[Source]:
    """Everything that gets a panel: the SAE, a second one, a control.

    Raises:
        InputError: No evidence, names or scores of another SAE, or a control that is none.
    """
    out = []
    for at, sae, title, key, control in (
        (given.evidence, given.sae, "SAE", "main", False),
        (given.other, given.other_sae, "second SAE", "other", False),
        (given.control, "", "control", "control", True),
    ):
        if not at:
            continue
        evidence, main = Evidence(at, where=given.where), key == "main"
        if control and evidence.about["job"]["sae"] == out[0].evidence.about["job"]["sae"]:
            raise InputError(f"control {at} is evidence of the SAE itself: collect some of random weights")
        if not main and evidence.about["job"].get("host") != out[0].evidence.about["job"].get("host"):
            evidence = Evidence(at)
        file = given.names if main and given.names else Path(at) / "names" / "names.json"
        names = read_names(file, evidence.about["job"]["sae"]) if (main and given.names) or Path(file).exists() else {}
        folder = Path(given.scores) if main and given.scores else Path(at) / "scores"
        scores = read_scores(folder, evidence.d_sae)
        out.append(Source(key, title, evidence, atoms_of(evidence, sae), names, scores, control))
    return out


def write_site(out: Path, given: Inputs, display: Display, pages: Pages, progress: bool = True) -> dict[str, Any]:
    """Write the browser, whole or not at all.

    Returns:
        ``out`` and ``bytes``.

    Raises:
        InputError: What is given does not go together, or the folder holds something else.
    """
    refuse_foreign(out, MARK)
    check_writable(out)
    found = sources(given)

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    with disk_errors(out), atomic_folder(out) as temp:
        data = temp / "data"
        about: dict[str, Any] = {"format": FORMAT, "images": display.images, "panels": [], "pages": []}
        if given.other:
            main, other = found[0], found[1]
            pair = match(main.evidence, other.evidence, (main.atoms, other.atoms), display.seed)
            write_match(data, pair, (main.evidence.d_sae, other.evidence.d_sae))
            best = pair.cosine if pair.cosine is not None else pair.correlation
            if best is not None:
                columns = {**main.scores.get("columns", {}), "match": best[1]}
                found[0] = main._replace(scores={**main.scores, "columns": columns})
            about["pages"].append("compare")
        for source in found:
            e = source.evidence
            say(f"explore: {source.title}, {e.d_sae:,} latents, {e.n:,} items, {', '.join(e.modalities)}")
            panel = Panel(source, display, data)
            about["panels"].append(panel.write())
            for note in panel.notes:
                say(f"explore: {note}")
            if source.id == "main":
                write_table(temp / "exports" / "latents.parquet", panel.table, source.names, panel.words)
                if display.features:
                    write_lines(temp / "exports" / "features.jsonl", panel.features())
        about |= write_pages(data, found[0].evidence, pages, about["pages"])
        put(data, "site", about)
        title = display.title or Path(given.evidence).resolve().parent.name
        (temp / "index.html").write_text(page(f"Concepts of {title}"), "utf-8")
        shutil.copytree(STATIC, temp / "app", ignore=shutil.ignore_patterns("index.html", "__pycache__"))
        size = sum(p.stat().st_size for p in temp.rglob("*") if p.is_file())
        write_json(temp / MARK, {"format": FORMAT, "sae": found[0].evidence.about["job"]["sae"], "bytes": size})
    remove_leftovers(out)
    say(f"explore: {nbytes(size)}; open {out / 'index.html'} in a web browser")
    return {"out": str(out), "bytes": size}


def write_pages(data: Path, evidence: Evidence, pages: Pages, shown: list[str]) -> dict[str, Any]:
    """Write what there is beside panels; names of pages are added to ``shown``."""
    sae, out = evidence.about["job"]["sae"], {}
    if pages.tree:
        write_ontology(data, evidence, pages.tree)
        shown.append("tree")
    if pages.strips:
        out["strips"] = {str(j): files for j, files in write_strips(data, pages.strips, sae).items()}
    if pages.attributes:
        put(data, "attributes", read_attributes(pages.attributes, sae))
        shown.append("attributes")
    return out


def page(title: str) -> str:
    """The shell, which loads everything else."""
    scripts = "\n".join(f'<script src="app/{name}" defer></script>' for name in SCRIPTS)
    shell = (STATIC / "index.html").read_text(encoding="utf-8")
    return shell.replace("{{title}}", escape(title)).replace("{{scripts}}", scripts)

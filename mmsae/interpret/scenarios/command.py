"""``mmsae scenarios``: rare, surprising and failing situations of a corpus, and test suites of them."""

from __future__ import annotations

from typing import Any

from mmsae.interpret.scenarios.options import Mining, SuiteOptions


def scenarios(
    evidence: str,
    out: str = "",
    query: list[str] = [],  # noqa: B006  the help shows it; it is not changed
    failures: str = "",
    names: str = "",
    groups: str = "",
    cards: int = 200,
    mining: Mining = Mining(),
    suites: SuiteOptions = SuiteOptions(),
    progress: bool = True,
) -> dict[str, Any]:
    """Find the rare and risky situations of a corpus, with the evidence for them.

    OUT holds scenarios.json, situations.parquet (conjunctions of concepts with support, rarity and surprise, and the
    slices on which a model fails), items.parquet (the items of every query), cards.jsonl (a scene card for each of
    them), report.html, and with ``suite`` a folder of shards.

    Args:
        evidence: Folder that mmsae evidence wrote.
        out: Folder to write, which replaces that of an earlier run; default: EVIDENCE/scenarios.
        query: Situations to look for, each a query over concepts ("fog & ~day & count(person) >= 2") or a query.json.
        failures: Parquet file with columns ``uid`` and ``failed`` (or ``correct``): on what a model fails. Slices are
            found on the train half of the evidence and judged on the test half.
        names: File of names. Default: ``names/names.json`` in the evidence.
        groups: YAML file of the fields of scene cards. Default: light, weather, place, people, vehicles, animals,
            action.
        cards: Scene cards of each query at most.
        mining: What counts as a situation.
        suites: Test suite to write.
        progress: Whether to print what is done.

    Returns:
        What scenarios.json holds, with the folder as ``out``.

    Raises:
        InputError: An argument or a folder is not usable; one sentence says why.
    """
    from mmsae.interpret.scenarios.job import Request, find_scenarios

    return find_scenarios(
        Request(evidence, out, tuple(query), failures, names, groups, cards, progress), mining, suites
    )

"""The page of the ontology: a tree of classes, and which latents stand for its nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmsae.interpret.browser.files import put
from mmsae.interpret.evidence.folder import Evidence
from mmsae.types import InputError

CELLS = 3e7  # of codes that are dense at a time
LISTED = 20  # latents of a node


def write_ontology(folder: Path, evidence: Evidence, source: str, modality: str = "") -> dict[str, Any]:
    """Write ``tree.js``: nodes with the latents that stand for them, and how well latents follow the tree.

    Args:
        folder: ``data`` of the browser.
        evidence: With labels that are the tree's leaves.
        source: ``wordnet`` or a file, see :class:`mmsae.evaluation.ontology.tree.Tree`.
        modality: Whose codes. Default: the first.

    Returns:
        What it wrote.

    Raises:
        InputError: There are no labels, or the tree lacks some.
    """
    import torch

    from mmsae.evaluation.ontology.measures import class_sets, lch, placed
    from mmsae.evaluation.ontology.tree import Tree

    modality = modality or evidence.modalities[0]
    said = evidence.items.label
    names = sorted(set(said) - {""})
    if len(names) < 3:
        raise InputError(f"{evidence.folder} has {len(names)} labels, and an ontology is over 3 or more classes")
    tree = Tree.named(source, names)
    number = {name: i for i, name in enumerate(names)}
    known = np.array([i for i, x in enumerate(said) if x])
    labels = torch.tensor([number[said[i]] for i in known])
    lists, sets = evidence.lists(modality), []
    least = max(5, min(20, len(known) // len(names) // 2))
    block = max(1, int(CELLS / evidence.n))
    for lo in range(0, evidence.d_sae, block):
        rows = slice(lo, min(lo + block, evidence.d_sae))
        dense = np.abs(lists.matrix(rows).toarray())[:, known]
        sets.append(class_sets(torch.from_numpy(dense.T.copy()), labels, len(names), least=least).sets)
    found = torch.cat(sets)
    some = found.any(1).nonzero().flatten()
    latents: list[list[Any]] = [[] for _ in tree.nodes]
    if len(some):
        at = placed(tree, found[some])
        for j, node, purity in zip(some.tolist(), at["node"].tolist(), at["purity"].tolist(), strict=True):
            latents[node].append([j, round(purity, 3)])
    nodes = [
        {"name": tree.name(i), "parent": int(tree.parent[i]), "size": int(tree.sizes[i]),
         "latents": sorted(latents[i], key=lambda x: -x[1])[:LISTED]}
        for i in range(len(tree))
    ]  # fmt: skip
    measures = lch(tree, found)
    living = int((evidence.stats(modality).fired_items > 0).sum())
    sizes = measures.pop("sizes")
    out = {"nodes": nodes, "classes": tree.classes, "measures": _plain(measures), "sizes": sizes, "living": living}
    put(folder, "tree", out)
    return out


def _plain(measures: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON has no word for."""
    return {
        k: {n: None if x != x else round(x, 5) for n, x in v.items()}
        for k, v in measures.items()
        if isinstance(v, dict)
    }

"""A tree of classes, from a file of parents or from WordNet, and what ontology measures need of it.

WordNet is a graph: a synset may have several hypernyms. It is made a tree by keeping the longest hypernym path of each
synset (ties: alphabetical).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsae.files import lines_of, read_text
from mmsae.types import InputError


class Tree:
    """A tree whose leaves are classes; nodes without classes below them are dropped.

    Args:
        parents: ``{node: its parent}``; roots are absent or have an empty parent. Several roots get one above them.
        leaves: The classes, in the order of their numbers. Default: every node without children, sorted.
        collapse: Drop nodes with a single child, so that heights count branchings and not the detail of a dictionary.
        labels: ``{node: readable name}``.

    Raises:
        InputError: A cycle, a class that is not in the tree, or one that is an ancestor of another.
    """

    def __init__(
        self,
        parents: Mapping[str, str | None],
        leaves: Sequence[str] | None = None,
        collapse: bool = True,
        labels: Mapping[str, str] | None = None,
    ):
        up = {str(k): str(v) for k, v in parents.items() if v not in (None, "")}
        known = set(up) | set(up.values()) | {str(k) for k in parents}
        leaves = sorted(known - set(up.values())) if leaves is None else [str(c) for c in leaves]
        if missing := [c for c in leaves if c not in known]:
            raise InputError(f"the tree lacks {len(missing)} of {len(leaves)} classes: {', '.join(missing[:5])}")
        if len(set(leaves)) < len(leaves):
            raise InputError(f"{len(leaves)} classes have {len(set(leaves))} different nodes in the tree")
        chains = [_chain(c, up) for c in leaves]
        tops = sorted({chain[-1] for chain in chains})
        if len(tops) > 1:
            root = "(root)"
            chains = [[*chain, root] for chain in chains]
            up = up | dict.fromkeys(tops, root)
        below: dict[str, set[str]] = {}
        for chain in chains:
            for child, node in itertools.pairwise(chain):
                below.setdefault(node, set()).add(child)
        if inner := [c for c in leaves if c in below]:
            raise InputError(f"class {inner[0]} is above class {sorted(below[inner[0]])[0]} in the tree: not a leaf")
        drop = {n for n, children in below.items() if collapse and len(children) == 1}
        chains = [[n for n in chain if n not in drop] for chain in chains]
        inner_nodes = list(dict.fromkeys(n for chain in chains for n in chain[1:]))
        self.nodes = [*leaves, *inner_nodes]  #: Names of the V nodes; the C leaves come first, by number
        number = {n: i for i, n in enumerate(self.nodes)}
        self.parent = torch.arange(len(self.nodes))  #: ``(V,)``, the root is its own parent
        for chain in chains:
            for child, node in itertools.pairwise(chain):
                self.parent[number[child]] = number[node]
        self.classes = len(leaves)
        self.labels = dict(labels or {})
        self._chains = [[number[n] for n in chain] for chain in chains]

    @classmethod
    def named(cls, source: str, values: Sequence[Any]) -> Tree:
        """The tree over classes of these label values, from ``wordnet`` or a file."""
        leaves = [str(v) for v in values]
        return cls.from_wordnet(leaves) if source == "wordnet" else cls.load(source, leaves)

    @classmethod
    def load(cls, path: str | Path, leaves: Sequence[str] | None = None, collapse: bool = True) -> Tree:
        """Read ``.json`` (``{node: parent}``) or tab-separated ``node, parent[, name]``; ``#`` starts a comment line.

        Raises:
            InputError: Not readable, a line without a tab, or a node with two parents.
        """
        path, text = Path(path), read_text(path)
        if path.suffix == ".json":
            try:
                parents = json.loads(text)
            except ValueError as e:
                raise InputError(f"{path} is not JSON: {e}") from e
            if not isinstance(parents, dict):
                raise InputError(f"{path} holds a {type(parents).__name__}, expected one object of node: parent")
            return cls(parents, leaves, collapse)
        parents, labels = {}, {}
        for number, line in enumerate(lines_of(text), 1):
            if not line.strip() or line.startswith("#"):
                continue
            cells = [c.strip() for c in line.split("\t")]
            if len(cells) < 2:
                raise InputError(f"{path} line {number} has {len(cells)} columns, expected node and parent with a tab")
            if parents.setdefault(cells[0], cells[1]) != cells[1]:
                raise InputError(f"{path} line {number}: {cells[0]} has parents {parents[cells[0]]} and {cells[1]}")
            if len(cells) > 2:
                labels[cells[0]] = cells[2]
        return cls(parents, leaves, collapse, labels)

    @classmethod
    def from_wordnet(cls, synsets: Sequence[str], collapse: bool = True) -> Tree:
        """The tree above WordNet ids like ``n02085620``, by nltk's reader and the WordNet that the user has for it.

        Raises:
            InputError: No nltk, no WordNet data, or an id that is not a noun of it.
        """
        try:
            from nltk.corpus import wordnet
        except ImportError as e:
            raise InputError("tree: wordnet needs nltk (pip install nltk), or give a file of node and parent") from e
        parents, labels = {}, {}
        try:
            for wnid in synsets:
                synset = wordnet.synset_from_pos_and_offset(wnid[0], int(wnid[1:]))
                path = min(synset.hypernym_paths(), key=lambda p: (-len(p), [s.name() for s in p]))
                ids = [f"{s.pos()}{s.offset():08d}" for s in path]
                labels |= {i: s.lemma_names()[0] for i, s in zip(ids, path, strict=True)}
                for node, child in itertools.pairwise(ids):
                    parents.setdefault(child, node)  # the first path that reaches a synset says what is above it
        except LookupError as e:
            raise InputError(
                "tree: wordnet needs WordNet's files: python -m nltk.downloader wordnet, or give a file of node and "
                "parent"
            ) from e
        except ValueError as e:
            raise InputError(f"{wnid} is not a WordNet id such as n02085620") from e
        return cls(parents, synsets, collapse, labels)

    def __len__(self) -> int:
        return len(self.nodes)

    def name(self, node: int) -> str:
        """Readable name of a node."""
        return self.labels.get(self.nodes[node], self.nodes[node])

    @cached_property
    def member(self) -> Tensor:
        """``(V, C)`` float32 0 or 1: which classes are at or below each node."""
        out = torch.zeros(len(self), self.classes)
        for c, chain in enumerate(self._chains):
            out[chain, c] = 1
        return out

    @cached_property
    def sizes(self) -> Tensor:
        """``(V,)`` int64 number of classes at or below each node."""
        return self.member.sum(1).long()

    @cached_property
    def height(self) -> Tensor:
        """``(V,)`` int64 longest path down to a class; 0 for classes."""
        out = torch.zeros(len(self), dtype=torch.long)
        for chain in self._chains:
            at = torch.tensor(chain)
            out[at] = torch.maximum(out[at], torch.arange(len(chain)))
        return out

    @cached_property
    def depth(self) -> Tensor:
        """``(V,)`` int64 path up to the root; 0 for the root."""
        out = torch.zeros(len(self), dtype=torch.long)
        for chain in self._chains:
            out[torch.tensor(chain)] = torch.arange(len(chain) - 1, -1, -1)
        return out

    @property
    def internal(self) -> Tensor:
        """``(I,)`` int64 nodes above classes."""
        return torch.arange(self.classes, len(self))

    def lca(self, sets: Tensor) -> Tensor:
        """``(F,)`` int64 lowest common ancestor of each set of classes ``(F, C)``; -1 for empty ones."""
        s = sets.to(self.member).T
        inside = self.member @ s >= s.sum(0)  # (V, F): nodes that cover the set form a chain from the root
        low = torch.where(inside, self.depth[:, None], -1).argmax(0)
        return torch.where(s.any(0), low, -1)

    @cached_property
    def pair_depth(self) -> Tensor:
        """``(C, C)`` int64 depth of the lowest common ancestor of two classes; a class's own depth on the diagonal."""
        inner = self.member[self.classes :]
        common = (inner.T @ inner).long() - 1  # ancestors in common, the root at depth 0
        return common.masked_fill(torch.eye(self.classes, dtype=torch.bool), 0) + torch.diag(self.depth[: self.classes])

    def similarity(self) -> Tensor:
        """``(C, C)`` float64 ``1 / (1 + path length)`` between classes."""
        d = self.depth[: self.classes]
        return 1 / (1.0 + (d[:, None] + d[None] - 2 * self.pair_depth).double())


def _chain(leaf: str, up: Mapping[str, str]) -> list[str]:
    chain, seen = [leaf], {leaf}
    while (node := up.get(chain[-1])) is not None:
        if node in seen:
            raise InputError(f"the tree has a cycle: {node} is above itself")
        chain.append(node)
        seen.add(node)
    return chain

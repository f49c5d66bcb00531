"""What an analysis reads: the codes of the items of a folder of evidence, or of a part of one, as a sparse matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmsae.files import lines_of, read_text
from mmsae.interpret.analyse.options import Analysing, Splitting
from mmsae.interpret.evidence.folder import Evidence
from mmsae.metrics.concepts.names import FILE, names_only, read_names
from mmsae.metrics.concepts.query import Query, evaluate, query_of
from mmsae.types import IMAGE, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from mmsae.interpret.areas.relations import CorpusAreas

ENTRIES = 2**24  # entries of a matrix that are counted at a time
SAME = ("sae", "host", "pool")  # what two folders must agree in, for their codes to be comparable


class Corpus(NamedTuple):
    """Some items of a folder of evidence."""

    name: str  #: What it is called on pages
    evidence: Evidence  #: The folder
    rows: np.ndarray  #: ``(n,)`` which of its items

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.rows)

    def codes(self, modality: str) -> csr_matrix:
        """``(n, d_sae)`` pooled codes."""
        whole = self.evidence.codes(modality).matrix()
        return whole if self.n == self.evidence.n else whole[self.rows]

    def without_copies(self) -> Corpus:
        """The same with the first of every set of near-duplicates alone."""
        copy_of = self.evidence.items.copy_of[self.rows]
        first = np.unique(np.where(copy_of < 0, self.rows, copy_of), return_index=True)[1]
        return self._replace(rows=self.rows[np.sort(first)])


def whole(evidence: Evidence, name: str = "") -> Corpus:
    """All items of a folder."""
    return Corpus(name or evidence.folder.name, evidence, np.arange(evidence.n))


def which_modality(evidence: Evidence, asked: str) -> str:
    """The modality that is asked for, or ``image``, or the only one.

    Raises:
        InputError: The evidence has no such codes.
    """
    have = evidence.modalities
    if asked and asked not in have:
        raise InputError(f"modality is {asked!r}, and {evidence.folder} has codes of {', '.join(have)}")
    return asked or (IMAGE if IMAGE in have else have[0])


def latent_names(evidence: Evidence, path: str | None) -> dict[int, str]:
    """Names from a file, or from where ``mmsae name`` writes them; latents without a name are absent."""
    default = evidence.folder / "names" / FILE
    found = path or (str(default) if default.exists() else None)
    return names_only(read_names(found, evidence.about["job"]["sae"]))


def called(latent: int, names: Mapping[int, str]) -> str:
    """``#12 red circle``."""
    return f"#{latent} {names.get(latent, '')}".strip()


def two_corpora(folders: Sequence[Evidence], splitting: Splitting, names: Mapping[int, str]) -> tuple[Corpus, Corpus]:
    """The two sides of a comparison: two folders, or one that is split.

    Raises:
        InputError: Not exactly one way of having two sides, folders that are not comparable, or a side without items.
    """
    given = [f for f in ("split", "labels_a", "uids") if getattr(splitting, f)]
    if len(folders) > 2:
        raise InputError(f"diff compares two folders of evidence, and {len(folders)} are given")
    if len(folders) == 2:
        if given or splitting.labels_b:
            raise InputError(
                f"two folders are given, and {(given or ['labels_b'])[0]} splits one: give one or the other"
            )
        a, b = folders
        for field in SAME:
            one, other = (e.about["job"].get(field) for e in folders)
            if one != other:
                raise InputError(f"{a.folder} is evidence of {field} {str(one)[:12]} and {b.folder} of {field} "
                                 f"{str(other)[:12]}: their codes do not compare")  # fmt: skip
        pair = whole(a, _other_name(a, b)), whole(b, _other_name(b, a))
    else:
        if len(given) != 1:
            raise InputError(
                f"{folders[0].folder} is one corpus, and diff compares two: give a second folder, or one of split, "
                f"labels_a and uids{f', not {len(given)} of them' if given else ''}"
            )
        pair = _split(folders[0], splitting, names)
    for side in pair:
        if not side.n:
            raise InputError(f"{side.name} is without items: there is nothing to compare")
    return pair


def _other_name(one: Evidence, other: Evidence) -> str:
    """The part of a folder's path in which it differs from another's, such as ``cats`` of ``runs/cats/evidence``."""
    own, its = one.folder.resolve().parts[::-1], other.folder.resolve().parts[::-1]
    return next((a for a, b in zip(own, its, strict=False) if a != b), one.folder.name)


def _split(evidence: Evidence, s: Splitting, names: Mapping[int, str]) -> tuple[Corpus, Corpus]:
    if s.split:
        query = query_of(s.split, evidence.about["job"]["sae"])
        lists = {m: evidence.lists(m) for m in evidence.modalities}
        areas = areas_for(evidence, query)
        a, text = evaluate(query, lists, names=names, areas=areas, holds=True), str(query)
        b, called_b = ~a, f"not ({text})"
        if areas is not None:  # the others are on neither side
            a, b = a & areas.known, b & areas.known
    elif s.labels_a:
        label = np.array(evidence.items.label)
        known = set(evidence.items.label)
        if wrong := [c for c in (*s.labels_a, *s.labels_b) if c not in known]:
            raise InputError(f"no item of {evidence.folder} has the label {wrong[0]!r}; there are "
                             f"{', '.join(sorted(known - {''})[:8]) or 'none'}")  # fmt: skip
        a, text = np.isin(label, s.labels_a), ", ".join(s.labels_a)
        b, called_b = (np.isin(label, s.labels_b), ", ".join(s.labels_b)) if s.labels_b else (~a, f"not {text}")
        if (a & b).any():
            raise InputError(f"labels {sorted(set(s.labels_a) & set(s.labels_b))} are on both sides")
    else:
        uids = read_uids(s.uids)
        a, text = np.array([u in uids for u in evidence.items.uid]), Path(s.uids).stem
        b, called_b = ~a, f"not {text}"
    return Corpus(text, evidence, np.flatnonzero(a)), Corpus(called_b, evidence, np.flatnonzero(b))


def areas_for(evidence: Evidence, query: Query) -> CorpusAreas | None:
    """Areas of the items in evidence, whose patches are kept, where a query asks for areas.

    Raises:
        InputError: The evidence is of a site without a patch grid.
    """
    if not query.calls():
        return None
    from mmsae.interpret.areas.relations import CorpusAreas

    return CorpusAreas.of_evidence(evidence)


def read_uids(path: str) -> set[str]:
    """The uids of a file: one a line, or DataComp's ``u8,u8`` list.

    Raises:
        InputError: No such file.
    """
    if not path.endswith(".npy"):
        return {line.strip() for line in lines_of(read_text(path)) if line.strip()}
    try:
        pairs = np.load(path)
        return {f"{a:016x}{b:016x}" for a, b in pairs.tolist()}
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{path} is no list of uids: {e}") from e


def presence(codes: Sequence[csr_matrix], above: float = 0.0) -> list[csr_matrix]:
    """Several corpora's codes as 0 and 1 (``int32``): whether a concept is there.

    It is where a value's percentile, by size and among the items of all corpora on which the latent fires, is above
    ``above``.
    """
    from scipy.sparse import csr_matrix, vstack

    both = vstack(list(codes), format="csr") if len(codes) > 1 else codes[0]
    on = both.data != 0
    if above:
        size, latent = np.abs(both.data[on]), both.indices[on]
        order = np.lexsort((size, latent))
        size, latent = size[order], latent[order]
        count = np.bincount(latent, minlength=both.shape[1])
        start = np.cumsum(count) - count
        last = np.flatnonzero(np.append((latent[1:] != latent[:-1]) | (size[1:] != size[:-1]), True))
        rank = np.repeat(last, np.diff(last, prepend=-1)) + 1 - start[latent]  # equal values share the highest
        kept = np.empty(len(size), bool)
        kept[order] = rank / count[latent] > above
        on[np.flatnonzero(on)] = kept
    if on.all():
        binary = csr_matrix((np.ones(len(on), np.int32), both.indices, both.indptr), shape=both.shape)
    else:
        running = np.concatenate([[0], np.cumsum(on)])
        ones = np.ones(int(on.sum()), np.int32)
        binary = csr_matrix((ones, both.indices[on], running[both.indptr]), shape=both.shape)
    ends = np.cumsum([0, *(c.shape[0] for c in codes)])
    return [binary[lo:hi] for lo, hi in pairwise(ends)]


def counts(binary: csr_matrix) -> np.ndarray:
    """``(d_sae,)`` items in which each concept is."""
    out = np.zeros(binary.shape[1], np.int64)
    for lo in range(0, binary.nnz, ENTRIES):  # numpy counts in 64 bits, so that half a billion entries would take 4 GB
        out += np.bincount(binary.indices[lo : lo + ENTRIES], minlength=len(out))
    return out


def read_analysis(folders: Sequence[str], given: Analysing) -> tuple[list[Evidence], str, dict[int, str]]:
    """The folders of an analysis, the modality that it reads, and the names of latents."""
    if not folders:
        raise InputError("no folder of evidence is given (mmsae evidence writes one)")
    found = [Evidence(f) for f in folders]
    return found, which_modality(found[0], given.modality), latent_names(found[0], given.names)

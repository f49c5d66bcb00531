"""Vectors of latents and of words, for the search by concept vectors in the page: ``like #12 - #40``, ``like dog``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmsae.evaluation.labels import read_templates
from mmsae.interpret.browser.files import packed
from mmsae.interpret.browser.relations import unit_rows
from mmsae.interpret.embedder import Embedder, known_vectors
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.options import Whereabouts
from mmsae.interpret.guesses import FOLDER
from mmsae.interpret.names.centroid import centred
from mmsae.interpret.names.vocabulary import read_vocabulary
from mmsae.types import IMAGE, InputError

WIDTH = 48  # coordinates that are kept
VOCABULARY, LEAST = 3000, 5  # words at most, and captions that each must be in where words are of captions


class Words(NamedTuple):
    """What a search by words goes by."""

    text: list[str]  #: w words and phrases, in lower case
    vectors: np.ndarray | None  #: ``(w, width)`` in the space of the latents; None: there are none
    of: str  #: Whose vectors they are: a host's name, ``captions``, or empty
    note: str = ""  #: Why they are not of the host


def latent_vectors(
    evidence: Evidence, atoms: np.ndarray | None, vocabulary: str = "common", names: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Vectors of all latents, and of words.

    Where the evidence has embeddings, a latent is the mean embedding of the items on which it fires, weighted by its
    values, each modality about its own mean. Words are those of a vocabulary and the names of latents, as the host of
    the embeddings reads them, about their mean; where that has no text tower, those of the captions, each the mean
    embedding of the captions that have it. Without embeddings latents are their atoms, and there are no words.

    Args:
        evidence: The evidence.
        atoms: ``(d_sae, d)`` atoms of the SAE, or None.
        vocabulary: List or file of phrases (:func:`mmsae.interpret.names.vocabulary.read_vocabulary`); ``captions``:
            no host is loaded.
        names: Names of latents, which are searched by as well.

    Returns:
        ``latents`` ``(d_sae, 48)`` and ``words``: ``text``, ``vectors (w, 48)``, ``of`` and ``note``, in whole numbers,
        unit rows times 127; None where there is nothing to go by.
    """
    means = _centroids(evidence)
    vectors = atoms if means is None else means
    if vectors is None:
        return None
    words = Words([], None, "") if means is None else _words(evidence, means, vocabulary, names)
    joined = vectors if words.vectors is None else np.concatenate([vectors, words.vectors])
    joined = unit_rows(joined).astype(np.float64)
    joined[~np.isfinite(joined)] = 0
    values, axes = np.linalg.eigh(joined.T @ joined)
    kept = unit_rows(joined @ axes[:, np.argsort(-values)[:WIDTH]])
    whole = np.rint(127 * kept)
    d_sae = evidence.d_sae
    return {
        "of": "atoms" if means is None else "items",
        "latents": packed(whole[:d_sae], "i1"),
        "words": {"text": words.text, "vectors": packed(whole[d_sae:], "i1"), "of": words.of, "note": words.note},
    }


def _words(evidence: Evidence, means: np.ndarray, vocabulary: str, names: Sequence[str]) -> Words:
    """By the host where it reads text (or knows classes), else by captions."""
    if vocabulary == "captions":
        return _of_captions(evidence)
    modality = next(m for m in evidence.modalities if evidence.embeddings(m) is not None)
    cache = evidence.folder / FOLDER / "vectors"
    found = Embedder.of(evidence, modality, cache=cache if cache.is_dir() else None)
    phrases = read_vocabulary(vocabulary)
    try:
        known = found is not None and found.knows_words
        if known:
            templates = read_templates("simple") if modality == IMAGE else ["{}"]
            listed = phrases if found.reads_text else list(found.classes)
            tables = [known_vectors(found, part, templates) for part in (listed, list(dict.fromkeys(names))) if part]
            return _nearest([*listed, *dict.fromkeys(names)], np.concatenate(tables), means, found.name)
        why = "the evidence does not say whose its embeddings are" if found is None else f"{found.name} reads no text"
    except InputError as e:
        if evidence.where != Whereabouts():
            raise  # who says where the host is wants it
        why = str(e)
    return _of_captions(evidence)._replace(note=why)


def _nearest(text: Sequence[str], vectors: np.ndarray, means: np.ndarray, of: str) -> Words:
    """Those with a vector, each once, in any case; of more than :data:`VOCABULARY` the ones nearest to some latent."""
    first = {t.lower(): i for i, t in reversed(list(enumerate(text))) if not np.isnan(vectors[i]).any()}
    keys = sorted(first, key=lambda t: first[t])
    rows = centred(vectors[[first[t] for t in keys]])
    if len(rows) > VOCABULARY:
        best = np.full(len(rows), -np.inf)
        for lo in range(0, len(means), 1024):
            best = np.maximum(best, (np.nan_to_num(unit_rows(means[lo : lo + 1024])) @ rows.T).max(0))
        kept = np.sort(np.argsort(-best, kind="stable")[:VOCABULARY])
        keys, rows = [keys[i] for i in kept], rows[kept]
    return Words(keys, rows.astype(np.float32), of)


def _centroids(evidence: Evidence) -> np.ndarray | None:
    """``(d_sae, width)`` mean centred embeddings of the items on which latents fire, or None."""
    out = None
    for m in evidence.modalities:
        embeddings = evidence.embeddings(m)
        if embeddings is None:
            continue
        centred = embeddings - embeddings.mean(0, dtype=np.float64).astype(np.float32)
        found = np.zeros((evidence.d_sae, embeddings.shape[1]), np.float32)
        for lo in range(0, evidence.d_sae, 1024):
            rows = slice(lo, min(lo + 1024, evidence.d_sae))
            found[rows] = unit_rows(abs(evidence.lists(m).matrix(rows)) @ centred)
        if out is None or out.shape[1] == found.shape[1]:
            out = found if out is None else out + found
    return out


def _of_captions(evidence: Evidence) -> Words:
    """Words of captions, with the mean centred embeddings of the captions that have them."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    m = "text" if evidence.embeddings("text") is not None else "image"
    embeddings, captions = evidence.embeddings(m), evidence.items.caption
    if embeddings is None or not any(captions):
        return Words([], None, "")
    counter = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w[\w'-]+\b", max_features=VOCABULARY + 400)
    count = counter.fit_transform(captions)
    words, often = counter.get_feature_names_out(), np.asarray(count.sum(0)).ravel()
    kept = np.flatnonzero((often >= LEAST) & (often <= 0.5 * len(captions)) & ~np.isin(words, list(ENGLISH_STOP_WORDS)))
    kept = kept[np.argsort(-often[kept], kind="stable")[:VOCABULARY]]
    if not len(kept):
        return Words([], None, "")
    about = embeddings - embeddings.mean(0, dtype=np.float64).astype(np.float32)
    return Words(words[kept].tolist(), unit_rows((count[:, kept].T @ about) / often[kept, None]), "captions")

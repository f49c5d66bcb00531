"""Putting parts together: memory that does not grow with the number of items, and the same result for any blocks."""

import tracemalloc

import numpy as np
import pytest
import torch

from benchmarks.evidence import merge, write_parts
from mmsae.interpret.evidence import lists, negatives
from mmsae.interpret.evidence import merge as merge_module
from mmsae.interpret.evidence import parts as parts_module
from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.folder import map_arrays
from mmsae.interpret.evidence.lists import latent_blocks
from mmsae.interpret.evidence.options import Evidencing
from mmsae.types import IMAGE

D = 512
CHOICE = Evidencing(n_top=8, each=2, negatives=6, candidates=64)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.PER_TAR", 500)
    monkeypatch.setattr("benchmarks.evidence.BATCH", 125)
    monkeypatch.setattr(parts_module, "CHUNK", 5000)
    monkeypatch.setattr(merge_module, "ENTRIES", 4096)
    budget = lambda corpus, m, d: latent_blocks(corpus, m, d, 8000)  # noqa: E731
    monkeypatch.setattr(merge_module, "latent_blocks", budget)


def peak(folder, n):
    parts = write_parts(folder / "parts", n, D, 30, width=8)
    tracemalloc.start()
    try:
        assert len(list(merge(folder / "out", parts, D, CHOICE))) == 4
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_some_bytes_an_item(small, tmp_path):
    peak(tmp_path / "warm", 500)
    sizes = {n: peak(tmp_path / str(n), n) for n in (4000, 16000)}
    per_item = (sizes[16000] - sizes[4000]) / 12000
    assert per_item < 200, sizes  # entries alone would be 720, signatures 768, embeddings 32


def test_parts_in_chunks_and_lists_in_blocks_are_those_of_the_whole(small, tmp_path, monkeypatch):
    for name in ("small", "whole"):
        (tmp_path / name).mkdir()
        if name == "whole":
            monkeypatch.undo()
            monkeypatch.setattr("benchmarks.evidence.PER_TAR", 500)
            monkeypatch.setattr("benchmarks.evidence.BATCH", 125)
        list(merge(tmp_path / name / "out", write_parts(tmp_path / name, 1500, D, 30, width=8), D, CHOICE))
    for file in (tmp_path / "small" / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / "out" / file.name).read_bytes(), file.name


def test_lists_are_the_codes_turned(small, tmp_path):
    parts = write_parts(tmp_path / "parts", 1200, D, 30, width=8)
    list(merge(tmp_path / "out", parts, D, CHOICE))
    codes, turned = (map_arrays(tmp_path / "out" / f"{k}-image.safetensors") for k in ("codes", "lists"))
    z = np.zeros((1200, D), np.float32)
    z[np.repeat(np.arange(1200), np.diff(codes["start"])), codes["latent"]] = codes["value"]
    back = np.zeros_like(z)
    back[turned["item"], np.repeat(np.arange(D), np.diff(turned["start"]))] = turned["value"]
    assert (z == back).all() and (z != 0).sum() == len(codes["value"])
    corpus = CorpusItems.read(parts[0], [IMAGE])
    assert corpus.n == 1200 and [first for _, first in corpus.parts()] == [0, 500, 1000]


def test_codes_say_what_is_alike_where_nothing_embeds(small, tmp_path):
    parts = write_parts(tmp_path / "parts", 600, D, 30, width=8)
    list(merge(tmp_path / "out", parts, D, CHOICE))
    corpus, codes = CorpusItems.read(parts[0], [IMAGE]), map_arrays(tmp_path / "out" / "codes-image.safetensors")
    rows = merge_module.SparseRows(codes["start"], codes["latent"], codes["value"], D)
    silence = negatives.Silence(corpus, None, CHOICE, rows, None, torch.device("cpu"))
    z = rows.matrix().toarray()
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    for block in lists.latent_blocks(corpus, IMAGE, D, 10**6):
        ranked = lists.RankedBlock.of(block, corpus, None)
        positive, eligible = lists.positives_of(block, ranked, corpus, CHOICE)
        flat = positive.reshape(len(positive), -1)
        _, hard = silence.of(block, flat, eligible)
        for j in np.flatnonzero(eligible)[:40]:
            own = flat[j][(flat[j] >= 0) & ~corpus.test[flat[j]]]
            if not len(own):
                continue
            pool = silence.near[0].items
            pool = pool[z[pool, j] == 0]
            score = unit[pool] @ unit[own].sum(0)
            got = hard[j, :3][: len(pool)]
            assert (got >= 0).all() and (hard[j, len(got) : 3] == -1).all()
            assert (z[got, j] == 0).all() and not corpus.test[got].any()
            expected = np.sort(score)[::-1][: len(got)]
            np.testing.assert_allclose(unit[got] @ unit[own].sum(0), expected, rtol=1e-4)

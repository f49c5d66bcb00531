"""Queries: what is read, what it is worth, and the laws of its algebra."""

import json
import random
import time

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.metrics.concepts.inverted import InvertedLists
from mmsae.metrics.concepts.query import Query, evaluate, parse, percentiles, query_of, read_query, write_query
from mmsae.types import InputError

NAMES = {0: "red", 1: "red circle", 2: "Red", 3: 'a "quoted" \\ name', 4: "night"}


def lists(dense):
    return InvertedLists.of(csr_matrix(np.asarray(dense, np.float32)))


@pytest.fixture
def codes():
    rng = np.random.default_rng(0)
    z = {m: rng.random((50, 6)) * (rng.random((50, 6)) < 0.4) for m in ("image", "text")}
    return {m: lists(v) for m, v in z.items()}, z


def test_percentiles_are_shares_of_positives():
    assert percentiles(np.array([3.0, 1, 2, 2])).tolist() == [1.0, 0.25, 0.75, 0.75]
    assert percentiles(np.array([-3.0, 1])).tolist() == [1.0, 0.5]  # by size
    assert percentiles(np.array([0.1, 5.0, 2.5]), among=np.array([1.0, 2, 3, 4])).tolist() == [0.25, 1.0, 0.5]
    assert percentiles(np.array([2.0]), among=np.array([])).tolist() == [1.0]


def test_by_hand():
    z = lists([[0, 2, 0], [1, 0, 0], [3, 1, 0], [2, 0, 5]])  # percentiles of 0: 0 1/3 1 2/3; of 1: 1 0 1/2 0
    one = {"image": z}

    def score(text, **options):
        return evaluate(text, one, **options).round(6).tolist()

    third = round(float(np.float32(1 / 3)), 6)
    assert score("#0") == pytest.approx([0, third, 1, 2 / 3], abs=1e-6)
    assert score("#0 & #1") == [0, 0, 0.5, 0]
    assert score("#0 | #1") == pytest.approx([1, third, 1, 2 / 3], abs=1e-6)
    assert score("#0 & ~#1") == pytest.approx([0, third, 0.5, 2 / 3], abs=1e-6)
    assert score("(#0 > .5)") == [0, 0, 1, 1]
    assert score("#0 > .5 & ~#2") == [0, 0, 1, 0]
    assert score("#2 == 1") == [0, 0, 0, 1]
    assert score("") == [1, 1, 1, 1]
    assert score("zero & ~one", names={0: "Zero", 1: "one"}) == score("#0 & ~#1")
    assert score('"z*"', names={0: "zero", 2: "zulu"}) == pytest.approx([0, third, 1, 1], abs=1e-6)
    assert evaluate("#0 & ~#1", one, holds=True).tolist() == [False, True, False, True]
    assert evaluate("#0 > .5 & #1", one, holds=True).tolist() == [False, False, True, False]
    assert evaluate("~~#1", one, holds=True).tolist() == [True, False, True, False]


def test_a_latent_without_a_modality_is_of_any(codes):
    by, _ = codes
    sides = [evaluate(f"{m}:#2", by) for m in ("image", "text")]
    assert (evaluate("#2", by) == np.maximum(*sides)).all()
    assert (evaluate("image:#2", by) == evaluate("#2", {"image": by["image"]})).all()


def test_percentiles_of_another_corpus(codes):
    by, z = codes
    few = {m: lists(v[:7]) for m, v in z.items()}
    assert (evaluate("#1 & ~image:#3", few, calibration=by) == evaluate("#1 & ~image:#3", by)[:7]).all()
    assert (evaluate("#1", few) != evaluate("#1", by)[:7]).any()


def a_tree(rng, depth=4):
    if depth == 0 or rng.random() < 0.2:
        modality = rng.choice(["", "image", "text"])
        if rng.random() < 0.3:
            return Query("name", name=rng.choice(list(NAMES.values())), modality=modality)
        return Query("latent", latent=rng.randrange(6), modality=modality)
    op = rng.choice(["~", "&", "|", ">", "<=", "count", "overlap"])
    if op == "count":
        return Query(">=", (Query("count", (Query("latent", latent=1),)),), value=rng.randrange(4))
    if op == "overlap":
        return Query("overlap", (Query("latent", latent=1), Query("name", name="night")))
    n = 1 if op in "~><=" else rng.randint(2, 4)
    return Query(op, tuple(a_tree(rng, depth - 1) for _ in range(n)), value=rng.random() if op in (">", "<=") else 0.0)


def test_text_and_tree_turn_into_each_other():
    rng = random.Random(0)
    for _ in range(300):
        tree = a_tree(rng)
        assert parse(str(tree)) == tree, str(tree)
    assert str(parse("")) == "" and parse("  ") == Query("all")
    assert str(parse('red   circle&~ "night"|#3')) == '("red circle" & ~"night") | #3'
    assert str(parse("count( red ) >= 2 & text:#4>.25")) == '(count("red") >= 2) & (text:#4 > 0.25)'


def test_laws(codes):
    """De Morgan, NOT NOT, order, and the empty query, to the bit."""
    by, _ = codes
    rng = random.Random(1)

    def same(a, b):
        return all(
            np.array_equal(evaluate(a, by, holds=h, names=NAMES), evaluate(b, by, holds=h, names=NAMES)) for h in (0, 1)
        )

    for _ in range(60):
        a, b, c = _three(rng)
        assert same(f"~(({a}) & ({b}))", f"~({a}) | ~({b})")
        assert same(f"~(({a}) | ({b}))", f"~({a}) & ~({b})")
        assert same(f"~~({a})", a)
        assert same(f"({a}) & ({b})", f"({b}) & ({a})") and same(f"({a}) | ({b})", f"({b}) | ({a})")
        assert same(f"(({a}) & ({b})) & ({c})", f"({a}) & (({b}) & ({c}))")
        assert same(f"({a}) & (({b}) | ({c}))", f"(({a}) & ({b})) | (({a}) & ({c}))")
    assert evaluate("", by, holds=True).all() and (evaluate("", by) == 1).all()


def _three(rng):
    found = []
    while len(found) < 3:
        tree = a_tree(rng, 2)
        found += [] if tree.calls() else [str(tree)]
    return found


class Areas:
    """Counts 0, 1, 2, ...; left_of where the first latent is smaller; overlap 1 / (1 + distance)."""

    def count(self, latents):
        return np.arange(50) * len(latents)

    def left_of(self, a, b):
        return np.full(50, float(min(a) < min(b)))

    def overlap(self, a, b):
        return np.full(50, 1 / (1 + abs(a[0] - b[0])))


def test_areas_are_asked(codes):
    by, _ = codes
    assert evaluate("count(#1) >= 3", by, areas=Areas()).tolist() == [0] * 3 + [1] * 47
    assert evaluate("count(red) >= 3", by, areas=Areas(), names=NAMES).tolist() == [0] * 2 + [1] * 48  # two are red
    counts = [evaluate(f"count(#1) >= {k}", by, areas=Areas()).sum() for k in range(6)]
    assert counts == sorted(counts, reverse=True)
    assert evaluate("left_of(#1, #2)", by, areas=Areas()).all()
    assert not evaluate("left_of(#2, #1)", by, areas=Areas()).any()
    assert evaluate("overlap(#1, #3) > .3", by, areas=Areas()).all()
    with pytest.raises(InputError, match="areas, and there are none"):
        evaluate("count(#1) >= 3", by)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("#1 &", "should stand where its end is"),
        ("#1 #2", "& or | should stand where '#2' at character 4 is"),
        ("(#1", r"\) should stand where its end"),
        ("#1 @ #2", "'@' at character 3 means nothing"),
        ("#1 > red", "a number should stand where 'red'"),
        ("count(#1)", "a comparison of the count"),
        ("left_of(#1)", ", should stand where"),
        ("image: & #1", "a latent"),
        ("~" * 5000 + "#1", "more than 100 levels"),
        ("(" * 5000 + "#1" + ")" * 5000, "more than 100 levels"),
        ("#9", "no latent #9: the SAE has 6"),
        ("audio:#1", "asks for audio, and there are codes of image, text"),
        ("blue", "no latent is named 'blue'"),
        ('"red circel"', "there are red circle"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(codes, text, says):
    with pytest.raises(InputError, match=says):
        evaluate(text, codes[0], names=NAMES)


def test_file(tmp_path):
    path = write_query(tmp_path / "query.json", "#12&~#40", "a" * 32, "odd ones")
    assert json.loads(path.read_text()) == {"format": 1, "sae": "a" * 32, "query": "#12 & ~#40", "name": "odd ones"}
    assert read_query(path, "a" * 32) == (parse("#12 & ~#40"), "a" * 32, "odd ones")
    assert query_of(str(path)) == query_of("#12 & ~#40")
    with pytest.raises(InputError, match="over SAE aaaaaaaaaaaa, and this is SAE bbbbbbbbbbbb"):
        read_query(path, "b" * 32)
    for text, says in (("[]", "no query file"), ("{", "no query file"), ('{"format": 2, "query": ""}', "format 2"),
                       ('{"query": "#1 |"}', "its end")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            read_query(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_query(tmp_path / "none.json")


def test_lists_of_codes():
    import torch

    from mmsae.types import Codes

    dense = torch.tensor([[0.0, 2, 0], [1, 0, 3]])
    for codes in (Codes(dense, None, 3), Codes(torch.tensor([[2.0, 0], [3, 1]]), torch.tensor([[1, 0], [2, 0]]), 3)):
        made = InvertedLists.of(codes)
        assert [[v.tolist() for v in made.row(j)] for j in range(3)] == [[[1], [1]], [[0], [2]], [[1], [3]]]
        assert (made.n, made.width) == (3, 2)


@pytest.mark.slow
def test_a_million_items():
    """Under a second with 64 latents an item, and memory that is linear in the entries."""
    n, k, block = 1_000_000, 64, 256
    rng = np.random.default_rng(0)
    columns = []
    for _ in range(k):  # an item has one latent of every block, the first of a block fires on 40 % of the items
        latent = (rng.random(n, np.float32) ** 6 * block).astype(np.uint8)
        columns.append((np.argsort(latent, kind="stable").astype(np.int32), np.bincount(latent, minlength=block)))
    item = np.concatenate([order for order, _ in columns])
    start = np.concatenate([[0], np.cumsum(np.concatenate([count for _, count in columns]))])
    big = InvertedLists(start, item, rng.random(n * k, np.float32), n)
    assert len(big.row(0)[0]) > 0.35 * n
    began = time.process_time()  # other processes do not count
    score = evaluate("(#0 | #256) & ~#512 & (#768 > .5 | ~(#1024 & #1280))", {"image": big})
    took = time.process_time() - began
    assert took < 1 and 0 < score.mean() < 1, took

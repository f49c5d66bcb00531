"""Trees, lowest common hypernyms, coverage, the permutation null, tree correlation."""

import json

import pytest
import torch

from mmsae.evaluation.ontology.measures import (
    class_sets,
    lca_depth,
    lch,
    placed,
    retrieval_coverage,
    signed,
    tree_correlation,
)
from mmsae.evaluation.ontology.tree import Tree
from mmsae.types import Codes, InputError

PETS = {"animal": "root", "dog": "animal", "cat": "animal", "poodle": "dog", "beagle": "dog", "siamese": "cat"}
BREEDS = ["poodle", "beagle", "siamese"]


@pytest.fixture
def pets():
    return Tree(PETS, BREEDS, collapse=False)


def binary(depth=3):
    """A full binary tree: leaves 0..2**depth - 1, nodes named by their bits."""
    parents = {}
    for d in range(depth, 0, -1):
        for i in range(2**d):
            bits = f"{i:0{d}b}"
            parents[bits] = bits[:-1] or "root"
    return Tree(parents, [f"{i:0{depth}b}" for i in range(2**depth)])


def test_the_oracle_tree(pets):
    sets = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0]]).bool()
    got = placed(pets, sets)
    assert [pets.nodes[i] for i in got["node"]] == ["dog", "animal", "poodle"]
    assert got["height"].tolist() == [1, 2, 0]
    assert got["purity"].tolist() == pytest.approx([1, 2 / 3, 1])
    assert {pets.nodes[i] for i in pets.internal.tolist()} == {"root", "animal", "dog", "cat"}
    assert got["coverage"] == 0.5  # dog and animal of the four


def test_f1_coverage_by_hand(pets):
    got = placed(pets, torch.tensor([[1, 1, 0]]).bool())
    # root and animal have all three classes: 2 * 2 / (3 + 2); dog 1; cat 0
    assert got["coverage_f1"] == pytest.approx((0.8 + 0.8 + 1 + 0) / 4)


def test_depths_paths_and_chains(pets):
    depth = {n: int(d) for n, d in zip(pets.nodes, pets.depth, strict=True)}
    assert depth == {"root": 0, "animal": 1, "dog": 2, "cat": 2, "poodle": 3, "beagle": 3, "siamese": 3}
    assert pets.pair_depth.tolist() == [[3, 2, 1], [2, 3, 1], [1, 1, 3]]
    assert pets.similarity()[0].tolist() == pytest.approx([1, 1 / 3, 1 / 5])
    short = Tree(PETS, BREEDS)
    assert set(short.nodes) == {*BREEDS, "dog", "animal"} and short.height.max() == 2  # root and cat had one child


def test_files(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("# a comment\n\n" + "\n".join(f"{k}\t{v}\tthe {k}" for k, v in PETS.items()))
    tree = Tree.load(table, BREEDS)
    assert tree.name(0) == "the poodle" and set(tree.nodes) == set(Tree(PETS, BREEDS).nodes)
    (tmp_path / "t.json").write_text(json.dumps({**PETS, "root": None}))
    assert Tree.load(tmp_path / "t.json", BREEDS).nodes == Tree(PETS, BREEDS).nodes
    assert Tree.load(tmp_path / "t.json").nodes[:3] == sorted(BREEDS)  # every node without children


@pytest.mark.parametrize(
    ("text", "leaves", "said"),
    [
        ("a b\n", None, "line 1 has 1 columns"),
        ("a\tb\na\tc\n", None, "parents b and c"),
        ("a\tb\nb\ta\n", ["a"], "cycle"),
        ("a\tb\nb\tc\n", ["a", "b"], "class b is above class a"),
        ("a\tb\n", ["a", "z"], "lacks 1 of 2 classes: z"),
    ],
)
def test_bad_trees(tmp_path, text, leaves, said):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(InputError, match=said):
        Tree.load(tmp_path / "t.tsv", leaves)


def test_forests_get_a_root_and_absent_files_are_named(tmp_path):
    tree = Tree({"a": "x", "b": "x", "c": "y", "d": "y"}, list("abcd"))
    assert tree.nodes[int(tree.lca(torch.ones(1, 4).bool())[0])] == "(root)"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Tree.load(tmp_path / "none.tsv")


def test_the_tree_of_tiny_imagenet_and_those_of_the_world():
    from pathlib import Path

    from mmsae.world.generator.scene import COLOURS, SHAPES

    configs = Path(__file__).parents[3] / "configs" / "eval"
    tree = Tree.load(configs / "tiny_imagenet.tsv")
    assert tree.classes == 140
    number = {tree.name(i): i for i in range(140)}
    pairs = {
        ("Chihuahua", "German shepherd"): "dog",
        ("lion", "Persian cat"): "feline",
        ("orange", "lemon"): "citrus",
        ("bee", "tarantula"): "arthropod",
        ("convertible", "school bus"): "conveyance",
    }
    for (a, b), want in pairs.items():
        assert (
            tree.nodes[int(tree.lca(torch.arange(140)[None].eq(number[a]) | torch.arange(140).eq(number[b])))] == want
        )
    world = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    for name, groups in (("colours", COLOURS), ("shapes", SHAPES)):
        own = Tree.load(configs / f"world_{name}.tsv", world)
        assert set(own.nodes) == {*world, *groups, "object"} and own.height.max() == 2


def planted(tree, per=30, noise=0.02, seed=0):
    """Codes with one feature per node of a tree, and the labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(tree.classes).repeat_interleave(per)
    on = tree.member[:, labels].T.bool() ^ (torch.rand(len(labels), len(tree), generator=g) < noise)
    z = on * (0.5 + torch.rand(on.shape, generator=g))
    return Codes(z, None, len(tree)), labels


def test_planted_features_lie_below_the_null_and_random_ones_do_not():
    tree = binary()
    z, labels = planted(tree)
    sets = class_sets(z, labels, 8)
    assert not sets.kept[tree.internal[tree.sizes[tree.internal] == 8]].any()  # the root fires on all classes
    want = tree.member.bool() & (tree.sizes <= 4)[:, None]
    assert torch.equal(sets.sets, want)
    got = lch(tree, sets.sets, draws=100)
    assert got["sizes"] == {"none": 1, "one": 8, "more": 6} and got["heights"] == [0, 4, 2, 0]
    height = got["height"]
    assert height["value"] == pytest.approx(8 / 6) and height["null"] > height["value"] + 2 * height["null_sd"]
    assert height["p"] < 0.03 and got["coverage"]["p"] < 0.03
    assert got["purity"]["value"] == 1 and got["coverage"]["value"] == pytest.approx(6 / 7)
    g = torch.Generator().manual_seed(1)
    shuffled = sets.sets[:, torch.randperm(8, generator=g)]
    assert lch(tree, shuffled, draws=100, seed=3)["height"]["p"] > 0.05
    assert "height" not in lch(tree, sets.sets[:8])  # single classes say nothing


def test_class_sets_drop_what_is_rare_wide_or_weak():
    labels = torch.arange(4).repeat_interleave(50)
    z = torch.zeros(200, 4)
    z[labels == 1, 0] = 1
    z[:10, 1] = 1  # fires on 10 images
    z[labels < 3, 2] = 1  # three of four classes
    z[labels == 2, 3] = 1
    z[labels == 3, 3] = 0.05  # below a tenth of the maximum
    got = class_sets(z, labels, 4)
    assert got.kept.tolist() == [True, False, False, True]
    assert got.sets.tolist() == [[False, True, False, False], [False] * 4, [False] * 4, [False, False, True, False]]
    with pytest.raises(InputError, match="class 4 of 5 has no image"):
        class_sets(z, labels, 5)


def test_class_sets_of_sparse_codes_are_those_of_their_matrix(monkeypatch):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 5
    indices = torch.rand(300, 15, generator=g).topk(4).indices
    codes = Codes(torch.randn(300, 4, generator=g), indices, 16)  # with signs; the last latent never fires
    z = codes.to_dense().abs()
    monkeypatch.setattr(Codes, "gather", lambda self, ids: pytest.fail("columns of a matrix are made"))
    for given in (codes, Codes(z, None, 16), z):
        got = class_sets(given, labels, 5, threshold=0.3, rate=0.25, chunk=7)
        on = z > 0.3 * z.amax(0)
        rate = torch.stack([on[labels == c].double().mean(0) for c in range(5)], 1)
        torch.testing.assert_close(got.rate, rate, rtol=1e-12, atol=0)
        kept = (on.sum(0) >= 20) & ((rate >= 0.25).sum(1) <= 2)
        assert torch.equal(got.kept, kept) and torch.equal(got.sets, (rate >= 0.25) & kept[:, None]) and kept.any()


def test_signed_channels_are_two_features_each():
    x = torch.tensor([[1.0, -2], [3, 4]])
    assert signed(x, torch.tensor([2.0, 1])).tolist() == [[0, 0, 1, 3], [1, 3, 0, 0]]


def test_tree_correlation_is_one_for_codes_that_are_the_tree_and_none_for_noise():
    tree = binary()
    got = tree_correlation(tree, tree.member.T, draws=100)  # cosine of ancestor sets is monotone in the path
    assert got["value"] == pytest.approx(1) and got["p"] < 0.03 and got["pairs"] == 28
    g = torch.Generator().manual_seed(0)
    noise = tree_correlation(tree, torch.randn(8, 200, generator=g), draws=100)
    assert abs(noise["value"]) < 4 * noise["null_sd"] and noise["p"] > 0.01


def test_retrieval_coverage_finds_planted_nodes_on_other_images():
    tree = binary()
    (z, labels), (held, held_labels) = planted(tree, noise=0.01), planted(tree, noise=0.01, seed=5)
    got = retrieval_coverage(tree, z, labels, held, held_labels)
    assert got["nodes"] == 6 and got["coverage"] == 1 and got["f1"] > 0.95 and set(got["by_depth"]) == {1, 2}
    noise = Codes(torch.rand(240, 30), None, 30)
    assert retrieval_coverage(tree, noise, labels, noise, labels)["f1"] < 0.6


def test_lca_depth_of_one_species_of_two_kingdoms_and_of_groups():
    tree = binary()
    labels = torch.arange(8).repeat_interleave(4)
    same, apart, few = torch.arange(4), torch.tensor([0, 4, 16, 20]), torch.tensor([0, 1, 2, -1])
    got = lca_depth(tree, torch.stack([same, apart, few]), labels, groups=(1 / 3, 2 / 3))
    assert got["depth"][0] == 3 and got["mode"].tolist() == [3, 0, -1] and got["depth"][2].isnan()
    # classes 0, 1, 4, 5: two pairs share their second bit (depth 2), four share nothing
    assert got["depth"][1] == pytest.approx(4 / 6) and got["features"] == 2
    assert got["groups"] == pytest.approx([3, 4 / 6])


def test_different_kingdoms_share_nothing():
    tree = binary()
    rows = torch.tensor([[0, 4]])
    assert lca_depth(tree, rows, torch.arange(8))["depth"].tolist() == [0.0]


class Synset:
    """As much of nltk's synsets as the tree needs."""

    def __init__(self, offset, word, *paths):
        self.number, self.word, self.paths = offset, word, paths

    def hypernym_paths(self):
        return [[*p, self] for p in self.paths] or [[self]]

    def name(self):
        return f"{self.word}.n.01"

    def lemma_names(self):
        return [self.word]

    def pos(self):
        return "n"

    def offset(self):
        return self.number


def test_wordnet_keeps_the_longest_path_and_the_first_by_name(monkeypatch):
    import sys
    from types import ModuleType, SimpleNamespace

    entity, pet, animal, canine, wolf = (
        Synset(i, w) for i, w in enumerate(("entity", "pet", "animal", "canine", "zoo"))
    )
    dog = Synset(10, "dog", [entity, pet], [entity, animal, canine])
    fox = Synset(11, "fox", [entity, animal, wolf], [entity, animal, canine])
    cat = Synset(12, "cat", [entity, pet])
    found = {s.offset(): s for s in (dog, fox, cat)}
    corpus = ModuleType("nltk.corpus")
    corpus.wordnet = SimpleNamespace(synset_from_pos_and_offset=lambda pos, offset: found[offset])
    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    tree = Tree.from_wordnet(["n00000010", "n00000011", "n00000012"], collapse=False)
    names = {tree.name(i): tree.name(int(p)) for i, p in enumerate(tree.parent)}
    assert names["dog"] == "canine" and names["fox"] == "canine" and names["cat"] == "pet" and "zoo" not in names
    with pytest.raises(InputError, match="not a WordNet id"):
        Tree.from_wordnet(["nope"])


def test_wordnet_without_its_files_says_what_to_do(monkeypatch):
    pytest.importorskip("nltk")
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(InputError, match="wordnet"):
        Tree.from_wordnet(["n02085620", "n02099601"])

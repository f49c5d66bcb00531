"""Suites: what they may say, and shifts of pictures."""

from pathlib import Path

import pytest
import torch

from mmsae.evaluation.card import classes, codes, detection, splitting, top_images, yardstick  # noqa: F401  they register heads
from mmsae.evaluation.shifts import SHIFTS, shift
from mmsae.evaluation.suite import HEADS, load_suite, parse_suite
from mmsae.types import InputError

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"
DATA = {"train": "a", "test": {"shards": ["b", "c"], "limit": 5}}


def test_all_heads_have_names_and_summaries():
    assert set(HEADS) == {"core", "error", "recovered", "zeroshot", "monosemantic", "unique", "pairs", "stable",
                          "probes", "ontology", "shifted", "ood", "absorbed", "targeted", "top_images",
                          "localised", "transfer"}  # fmt: skip
    assert all((h.__doc__ or "").strip().splitlines()[0][-1] in ".?" for h in HEADS.values())


def test_a_suite_with_defaults():
    suite = parse_suite({"data": DATA}, root="here")
    assert list(suite.heads) == list(HEADS) and suite.root == "here" and suite.label == "cls"
    assert suite.data["train"].shards == "a" and suite.data["test"].limit == 5
    assert list(parse_suite({"data": DATA, "heads": ["core"]}).heads) == ["core"]
    options = parse_suite({"data": DATA, "heads": {"core": None, "ontology": {"draws": 5}}}).heads
    assert options == {"core": {}, "ontology": {"draws": 5}}


@pytest.mark.parametrize(
    "path", sorted(p for p in CONFIGS.glob("*.yaml") if "data:" in p.read_text()), ids=lambda p: p.stem
)
def test_every_suite_of_the_repository_is_valid(path):
    suite = load_suite(str(path))
    assert suite.title and all(suite.find(t) for t in suite.trees.values() if t != "wordnet")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"data": {"train": "a"}}, "data has no test"),
        ({"data": DATA, "heds": {}}, "field 'heds'"),
        ({"data": {**DATA, "x": "c"}}, r"data\.x needs a role"),
        ({"data": {**DATA, "x": {"shards": "c", "role": "odd"}}}, "role is 'odd'"),
        ({"data": {**DATA, "x": {"shard": "c"}}}, "field 'shard'"),
        ({"data": {**DATA, "x": {"role": "ood"}}}, r"data\.x has no shards"),
        ({"data": {"train": {"shards": "a", "part": [0.5, 0.2]}, "test": "b"}}, r"part is \[0\.5, 0\.2\]"),
        ({"data": DATA, "heads": {"nope": {}}}, "no head 'nope'"),
        ({"data": DATA, "heads": {"core": {"draws": 5}}}, r"heads\.core has the option 'draws'"),
        ([], "suite is list"),
        (
            {"data": {"train": {"shards": "a", "exclude": "dog"}, "test": "b"}},
            r"data\.train: exclude is 'dog', expected",
        ),
        ({"data": {"train": {"shards": "a", "exclude": 5}, "test": "b"}}, "exclude is 5"),
        (
            {"data": {"train": {"shards": "a", "part": 0.5}, "test": "b"}},
            r"part is 0\.5, expected tuple\[float, float\]",
        ),
        ({"data": {"train": {"shards": "a", "part": ["x", "y"]}, "test": "b"}}, "part is"),
        ({"data": {"train": {"shards": "a", "limit": "many"}, "test": "b"}}, "limit is 'many', expected int"),
        ({"data": {"train": {"shards": "a", "limit": 0}, "test": "b"}}, "limit is 0, expected at least 1"),
        ({"data": {"train": {"shards": "a", "change": "blur"}, "test": "b"}}, "change is 'blur'"),
        ({"data": {**DATA, "id": {"shards": "c", "role": "ood"}}}, r"data\.id: choose another name"),
        ({"data": ["a"]}, r"data is \['a'\]"),
        ({"data": DATA, "heads": "core"}, "heads is 'core'"),
        ({"data": DATA, "heads": [{"core": {}}]}, "heads is"),
        ({"data": DATA, "heads": {"core": 5}}, r"heads\.core is 5"),
        ({"data": DATA, "heads": {"probes": {"ks": 5}}}, r"heads\.probes\.ks is 5, expected Sequence\[int\]"),
        ({"data": DATA, "trees": "t.tsv"}, r"trees is 't\.tsv', expected dict"),
    ],
)
def test_bad_suites_are_named(content, said):
    with pytest.raises(InputError, match=said):
        parse_suite(content)


def test_files_that_are_no_suites(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_suite(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("data: [")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_suite(str(tmp_path / "bad.yaml"))
    with pytest.raises(InputError, match="neither in the working folder"):
        parse_suite({"data": DATA}).find("nowhere.tsv")


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_keep_the_shape_and_change_something_the_same_way_twice(name):
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    strength = {"blur": 2.0, "local_mean": 3.0}.get(name, 0.5)
    a, b = shift({name: strength})(x), shift({name: strength})(x)
    assert a.shape == x.shape and torch.equal(a, b) and not torch.equal(a, x)


def test_shifts_by_hand():
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(shift({"dim": 0.2, "contrast": 1.0})(x), x - 0.2)
    grey = shift({"grey": 1})(x)
    torch.testing.assert_close(grey[:, 0], x.mean(1))
    assert (shift({"noise": 0.5})(x) - x).std().item() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(InputError, match="'fog' is not one of"):
        shift({"fog": 1})
    with pytest.raises(InputError, match="expected a number"):
        shift({"dim": "much"})

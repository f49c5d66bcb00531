import pytest

from mmsae.shards import Source, as_sources, expand
from mmsae.types import InputError


@pytest.fixture
def folder(tmp_path):
    for name in ("b-000.tar", "b-001.tar", "a-000.tar.gz", "c.tgz", "notes.txt", ".b-002.tar.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.tar").touch()
    return tmp_path


def names(paths, folder):
    return [p.removeprefix(f"{folder}/") for p in paths]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["a-000.tar.gz", "b-000.tar", "b-001.tar", "c.tgz"]),
        ("b-{000..001}.tar", ["b-000.tar", "b-001.tar"]),
        ("b-{001,000}.tar", ["b-001.tar", "b-000.tar"]),
        ("{b,a}-*", ["b-000.tar", "b-001.tar", "a-000.tar.gz"]),
        ("*.tar", ["b-000.tar", "b-001.tar"]),
        ("**/*.tar", ["b-000.tar", "b-001.tar", "sub/d.tar"]),
        ("sub", ["sub/d.tar"]),
        ("a-000.tar.gz", ["a-000.tar.gz"]),
    ],
)
def test_patterns(folder, pattern, found):
    assert names(expand(f"{folder}/{pattern}".rstrip("/")), folder) == found


def test_several_patterns_keep_their_order_and_a_shard_named_twice_is_read_once(folder):
    found = expand([f"{folder}/c.tgz", f"{folder}/b-*.tar", f"{folder}/b-000.tar"])
    assert names(found, folder) == ["c.tgz", "b-000.tar", "b-001.tar"]


def test_a_name_with_wildcard_characters_that_exists_is_that_file(tmp_path):
    (tmp_path / "x[1].tar").touch()
    assert expand(str(tmp_path / "x[1].tar")) == [str(tmp_path / "x[1].tar")]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("z-*.tar", r"No shard matches .*z-\*\.tar.*holds 4 other tars"),
        ("none/*.tar", "none does not exist"),
        ("b-{000..003}.tar", r"2 of the 4 shards .* do not exist; first: .*b-002\.tar"),
        ("notes.txt", "notes.txt is not a shard"),
        ("missing.tar", "No shard matches"),
        ("b-{000..001.tar", "braces"),
    ],
)
def test_what_matches_nothing_is_refused_in_one_sentence(folder, pattern, sentence):
    with pytest.raises(InputError, match=sentence) as e:
        expand(f"{folder}/{pattern}")
    assert "\n" not in str(e.value)


def test_as_sources():
    assert as_sources("a.tar") == [Source("a.tar")]
    assert as_sources(["a.tar", "b.tar"]) == [Source(["a.tar", "b.tar"])]
    assert as_sources({"a.tar": 1, "b.tar": 0.5}) == [Source("a.tar", 1), Source("b.tar", 0.5)]
    assert as_sources([Source("a.tar", 2.0, "x"), "b.tar"]) == [Source("a.tar", 2.0, "x"), Source("b.tar")]
    assert as_sources(Source("a.tar")) == [Source("a.tar")]
    with pytest.raises(InputError, match="weight"):
        as_sources({"a.tar": 0})
    with pytest.raises(InputError, match="empty"):
        expand([])

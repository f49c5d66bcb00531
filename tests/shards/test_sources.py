import os
import pickle

import pytest

from mmsae.shards import Source, as_sources, expand, identity, shard_name
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
        ("{sub,.}/*.tar", ["sub/d.tar", "./b-000.tar", "./b-001.tar"]),
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
        ("{b,z}-*.tar", r"1 of the 2 shards .* do not exist; first: .*z-\*\.tar"),
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


def made(root, *places):
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(place.encode())
    return [str(root / p) for p in places]


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (["a/0.tar", "b/1.tar"], ["0.tar", "1.tar"]),
        (["a/0.tar", "b/0.tar", "b/1.tar"], ["a/0.tar", "b/0.tar", "1.tar"]),
        (["x/train/0.tar", "y/train/0.tar", "z/0.tar"], ["x/train/0.tar", "y/train/0.tar", None]),
    ],
)
def test_tars_of_one_name_are_told_apart_by_the_shortest_end_of_their_paths(tmp_path, monkeypatch, places, named):
    paths = made(tmp_path, *places)
    named = [n or f"{tmp_path.name}/z/0.tar" for n in named]
    assert [shard_name(p) for p in expand(paths)] == named
    assert [shard_name(p) for p in expand(paths[::-1])] == named[::-1]  # nor on the order
    monkeypatch.chdir((tmp_path / places[0]).parent)
    here = [os.path.relpath(p) for p in paths]  # nor on the working folder
    assert [shard_name(p) for p in expand(here)] == named
    assert identity(expand(here)) == [[n, len(p)] for n, p in zip(named, places, strict=True)]


def test_a_part_of_a_set_keeps_its_names_and_so_does_a_copy_in_another_process(tmp_path):
    paths = expand(made(tmp_path, "a/0.tar", "b/0.tar"))
    assert [shard_name(p) for p in expand(paths[1:])] == ["b/0.tar"]
    assert shard_name(pickle.loads(pickle.dumps(paths[1]))) == "b/0.tar"
    assert shard_name(expand(str(paths[1]))[0]) == "0.tar"


def test_one_file_under_two_paths_is_refused(tmp_path, monkeypatch):
    made(tmp_path, "a/0.tar")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match=r"a/0\.tar and .*b/0\.tar are the same file"):
        expand([f"{tmp_path}/a", f"{tmp_path}/b"])
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(InputError, match=r"0\.tar and \./0\.tar are the same file"):
        expand(["0.tar", "./0.tar"])


@pytest.mark.parametrize("place", ["set [0]", "a{1,2}b", "x*y", "p/q [1]{0..3}"])
def test_wildcard_characters_of_folders_that_exist_are_none(tmp_path, place):
    paths = made(tmp_path, f"{place}/s-000.tar", f"{place}/s-001.tar")
    for pattern in ("", "*.tar", "s-*", "s-{000..001}.tar", "s-00[01].tar"):
        assert expand(f"{tmp_path}/{place}/{pattern}".rstrip("/")) == paths
    with pytest.raises(InputError, match=r"8 of the 10 shards .* do not exist; first: .*s-002\.tar"):
        expand(f"{tmp_path}/{place}/s-{{000..009}}.tar")
    with pytest.raises(InputError, match=r"holds 2 other tars"):
        expand(f"{tmp_path}/{place}/t-*.tar")


def test_names_with_brackets_of_which_some_are_missing_are_refused(tmp_path):
    made(tmp_path, "s[1]-000.tar", "s[1]-002.tar")
    with pytest.raises(InputError, match=r"1 of the 3 shards .* first: .*s\[1\]-001\.tar"):
        expand(f"{tmp_path}/s[1]-{{000..002}}.tar")


def test_upper_case_is_read_and_other_packing_is_said(tmp_path, caplog):
    found = made(tmp_path, "a.TAR", "b.tar", "c.Tar.Gz")
    assert expand(str(tmp_path)) == found and not caplog.records
    made(tmp_path, "d.tar.lz4", "e.txz", "notes.txt")
    assert expand(str(tmp_path)) == found
    assert "2 files are passed over, such as" in caplog.text and "d.tar.lz4" in caplog.text
    with pytest.raises(InputError, match=r"d\.tar\.lz4 is not a shard"):
        expand(f"{tmp_path}/d.tar.lz4")
    (tmp_path / "z").mkdir()
    made(tmp_path, "z/f.tar.bz2")
    with pytest.raises(InputError, match=r"holds 0 other tars and 1 packed in another way, such as .*f\.tar\.bz2"):
        expand(f"{tmp_path}/z/*.tar")


def test_a_file_name_that_is_not_utf8_gives_a_name_that_can_be_written(tmp_path):
    (tmp_path / "caf\udce9.tar").touch()
    assert shard_name(expand(str(tmp_path))[0]) == "caf\\xe9.tar"

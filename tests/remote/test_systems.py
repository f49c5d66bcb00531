import sys

import fsspec
import pytest

from mmsae.errors import InputError
from mmsae.remote import places, systems
from mmsae.remote.retry import TRIES


@pytest.fixture
def memory(cache_folder):
    """A file system in memory with three files."""
    files = fsspec.filesystem("memory")
    for name in ("x/b.tar", "x/a.tar", "x/deep/c.tar"):
        files.pipe(f"/{name}", name.encode() * 1000)
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_found_listed_and_brought(memory, tmp_path):
    (found,) = places.find(["memory://x/a.tar"])
    assert found.size == 7000 and found.tag
    assert [r.url for r in places.listed("memory://x/*.tar")] == ["memory:///x/a.tar", "memory:///x/b.tar"]
    assert [r.url for r in places.listed("memory://x")] == ["memory:///x/a.tar", "memory:///x/b.tar"]
    assert len(places.listed("memory://x", deep=True)) == 3
    places.bring(found, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"x/a.tar" * 1000
    assert places.tail(found, 5) == b"a.tar"


def test_a_changed_file_is_refused(memory, tmp_path):
    (found,) = places.find(["memory://x/a.tar"])
    memory.pipe("/x/a.tar", b"y" * 7000)
    with pytest.raises(InputError, match="has changed since it was found"):
        places.bring(found, tmp_path / "a")


def test_a_cut_transfer_is_tried_again_and_then_an_error(memory, tmp_path, monkeypatch):
    (found,) = places.find(["memory://x/a.tar"])
    whole, cuts = type(memory).get_file, []

    def cut(self, place, path, **options):
        whole(self, place, path, **options)
        if len(cuts) < limit:
            cuts.append(1)
            with open(path, "rb+") as file:
                file.truncate(10)

    monkeypatch.setattr(type(memory), "get_file", cut)
    limit = 2
    places.bring(found, tmp_path / "a")
    assert len(cuts) == 2 and (tmp_path / "a").stat().st_size == 7000
    limit = 100
    with pytest.raises(InputError, match=rf"cut after 10 of 7000 bytes \(tried {TRIES} times\)"):
        places.bring(found, tmp_path / "a")


def error(name, said):
    """An error of a store's own library."""
    return type(name, (Exception,), {})(said)


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (FileNotFoundError("bucket"), "does not exist: there is no such file, folder or bucket"),
        (PermissionError("Forbidden"), "no credentials in the environment, or none that may read it"),
        (error("NoCredentialsError", "Unable to locate credentials"), "no credentials in the environment"),
        (error("HttpError", "Anonymous caller does not have storage.objects.get, 401"), "no credentials"),
        (error("ClientError", "NoSuchBucket: it is not there"), "does not exist"),
        (error("SlowDown", "Please reduce your request rate"), rf"SlowDown: .*\(tried {TRIES} times\)"),
    ],
)
def test_errors_of_stores_are_told_apart(memory, monkeypatch, raised, sentence):
    def fails(self, path, **options):
        raise raised

    monkeypatch.setattr(type(memory), "info", fails)
    with pytest.raises(InputError, match=sentence):
        places.find(["memory://x/a.tar"])


@pytest.mark.parametrize(("url", "package"), [("s3://b/a.tar", "s3fs"), ("gs://b/a.tar", "gcsfs")])
def test_a_missing_package_is_named_with_its_extra(url, package, cache_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.split(":")[0], raising=False)
    with pytest.raises(InputError, match=rf"needs the package {package}.*pip install 'mmsae\[remote\]'"):
        places.find([url])


def test_unknown_schemes_are_refused(cache_folder):
    with pytest.raises(InputError, match="nowhere:// is no place that can be read"):
        systems.find("nowhere://x/a.tar")


def test_web_servers_cannot_be_listed(cache_folder):
    with pytest.raises(InputError, match=r"cannot be listed.*name its files, with braces"):
        places.listed("https://example.org/*.tar")

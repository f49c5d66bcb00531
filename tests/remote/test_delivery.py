import json
from pathlib import Path

import fsspec
import pytest

from mmsae.cli import main
from mmsae.errors import InputError
from mmsae.remote import systems
from mmsae.remote.delivery import delivered
from mmsae.shards import ShardWriter
from tests.helpers.encoders import MODELS, save_local
from tests.helpers.filtering import make_host
from tests.helpers.stores import image_bytes

OUT = "memory://bucket/runs/store"


@pytest.fixture
def memory(cache_folder):
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def made(out, more="content"):
    for name, text in {"spec.json": "{}", "a/b.bin": more, "z.bin": "last"}.items():
        (Path(out) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(out) / name).write_text(text)


def held(files):
    return {k.removeprefix("/bucket/runs/store/"): v.getvalue() for k, v in files.store.items()}


def test_written_whole_with_the_marks_last(memory, cache_folder, monkeypatch):
    order, real = [], systems.upload
    monkeypatch.setattr(systems, "upload", lambda path, url: (order.append(url.split("store/")[1]), real(path, url)))
    assert delivered(OUT, {"seed": 0}, made) == OUT
    assert order == ["a/b.bin", "z.bin", "spec.json"]
    assert set(held(memory)) == {"a/b.bin", "z.bin", "spec.json", "uploaded.json"}
    assert json.loads(held(memory)["uploaded.json"])["files"] == {"a/b.bin": 7, "spec.json": 2, "z.bin": 4}
    assert list((cache_folder.parent / "results").iterdir()) == []


def test_again_it_does_nothing_and_another_job_is_refused(memory, capsys):
    delivered(OUT, {"seed": 0, "workers": 1}, made)
    before = held(memory)
    delivered(OUT, {"seed": 0, "workers": 4}, lambda out: pytest.fail("done again"))
    assert "finished before; nothing to do" in capsys.readouterr().out and held(memory) == before
    with pytest.raises(InputError, match="holds the result of another job; choose another --out"):
        delivered(OUT, {"seed": 1}, made)
    memory.pipe("/other/notes.txt", b"x")
    with pytest.raises(InputError, match=r"holds other files, such as notes\.txt"):
        delivered("memory://other", {"seed": 1}, made)


def test_killed_work_goes_on(memory):
    def half(out):
        made(out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delivered(OUT, {"seed": 0}, half)
    assert set(held(memory)) == {"uploading.json"}
    with pytest.raises(InputError, match="holds the unfinished result of another job"):
        delivered(OUT, {"seed": 1}, made)
    found = []

    def rest(out):
        found.append((Path(out) / "a/b.bin").read_text())

    delivered(OUT, {"seed": 0}, rest)
    assert found == ["content"] and "uploading.json" not in held(memory) and "uploaded.json" in held(memory)


def test_a_transfer_that_fails_leaves_no_mark(memory, monkeypatch):
    real = type(memory).put_file

    def fails(self, path, place, **options):
        if place.endswith("z.bin"):
            raise OSError("the store is gone")
        return real(self, path, place, **options)

    monkeypatch.setattr(type(memory), "put_file", fails)
    with pytest.raises(InputError, match=r"z\.bin: OSError: the store is gone .*run the same command again"):
        delivered(OUT, {"seed": 0}, made)
    assert set(held(memory)) == {"a/b.bin", "uploading.json"}
    monkeypatch.setattr(type(memory), "put_file", real)
    delivered(OUT, {"seed": 0}, lambda out: None)
    assert set(held(memory)) == {"a/b.bin", "z.bin", "spec.json", "uploaded.json"}


def test_a_cut_upload_is_tried_again(memory, monkeypatch):
    real, cuts = type(memory).put_file, []

    def cut(self, path, place, **options):
        real(self, path, place, **options)
        if not cuts:
            cuts.append(place)
            self.pipe_file(place, b"c")

    monkeypatch.setattr(type(memory), "put_file", cut)
    delivered(OUT, {"seed": 0}, made)
    assert len(cuts) == 1 and held(memory)["a/b.bin"] == b"content"


def test_a_single_file(memory):
    delivered("memory://bucket/table.csv", {}, lambda out: Path(out).write_text("a,b\n"))
    assert {k: v.getvalue() for k, v in memory.store.items()} == {"/bucket/table.csv": b"a,b\n"}


@pytest.mark.parametrize("out", ["https://example.org/store", "pipe:cat", "nowhere://x/y"])
def test_what_cannot_be_written(memory, out):
    with pytest.raises(InputError, match=r"cannot be written|is no place"):
        delivered(out, {}, made)


def test_extract_to_a_store_elsewhere(memory, tmp_path, capsys):
    with ShardWriter(tmp_path / "shards", per_shard=5) as w:
        for i in range(10):
            w.write(f"{i}", {"png": image_bytes(i), "txt": f"picture {i}"})
    host = save_local(tmp_path / "host", MODELS["vit"], 0)
    options = ["--host", host, "--shards", str(tmp_path / "shards"), "--workers", "0", "--device", "cpu",
               "--batch-size", "4", "--progress", "false"]  # fmt: skip
    main(["extract", *options, "--out", str(tmp_path / "store")])
    main(["extract", *options, "--out", OUT])
    assert capsys.readouterr().out.splitlines()[-1] == OUT
    there = held(memory)
    assert there.pop("uploaded.json")
    assert there == {p.relative_to(tmp_path / "store").as_posix(): p.read_bytes()
                     for p in (tmp_path / "store").rglob("*") if p.is_file()}  # fmt: skip


def test_an_sae_is_converted_to_a_folder_elsewhere(memory, tmp_path):
    sae = make_host(tmp_path)
    main(["convert", sae, OUT])
    main(["convert", sae, str(tmp_path / "here")])
    there = held(memory)
    assert there.pop("uploaded.json") and "cfg.json" in there
    assert there == {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}

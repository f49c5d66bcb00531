"""Loose photographs as shards: what is kept, what is made smaller, what is said beside them, and what is unusable."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mmsae.errors import InputError
from mmsae.look.photographs import list_photographs, write_photographs
from mmsae.shards import FaultLog, read_shards


def photograph(path, size=(64, 48), kind="jpeg", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, kind, **options)
    return path


def samples(out):
    return list(read_shards(sorted(map(str, out.glob("*.tar"))), FaultLog(), need=("image",)))


def test_small_files_keep_their_bytes_and_large_ones_fit_the_short_side(tmp_path):
    small, large = (photograph(tmp_path / "in" / n, s) for n, s in (("a.jpg", (64, 48)), ("b.jpg", (900, 600))))
    log = write_photographs(tmp_path / "in", tmp_path / "out", short_side=100, progress=False)
    first, second = samples(tmp_path / "out")
    assert log.dropped == 0 and first.raw["jpg"] == small.read_bytes() != second.raw["jpg"]
    assert second.image.size == (150, 100) and second.meta["width"] == 900 and second.meta["file"] == large.name


@pytest.mark.parametrize("orientation", [3, 6])
def test_photographs_stand_as_their_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = photograph(tmp_path / "in" / "a.jpg", (300, 200), exif=exif.tobytes(), quality=95)
    write_photographs(tmp_path / "in", tmp_path / "out", short_side=100, progress=False)
    (found,) = samples(tmp_path / "out")
    upright = Image.open(path).convert("RGB").rotate({3: 180, 6: 270}[orientation], expand=True)
    assert found.image.size == ((100, 150) if orientation == 6 else (150, 100))
    wanted = np.asarray(upright.resize(found.image.size, Image.Resampling.LANCZOS), float)
    assert np.abs(wanted - np.asarray(found.image, float)).mean() < 3


def test_captions_and_folders_are_what_lies_beside(tmp_path):
    photograph(tmp_path / "cats" / "a.png", kind="png")
    (tmp_path / "cats" / "a.txt").write_text("a cat\n")
    photograph(tmp_path / "dogs" / "b.jpg")
    (tmp_path / "dogs" / "b.json").write_text(json.dumps({"captions": ["a dog", "a hound"], "width": 1, "place": "x"}))
    photograph(tmp_path / "c.jpg")
    (tmp_path / "c.json").write_text("{broken")
    write_photographs(tmp_path, tmp_path / "out" / "shards", progress=False)
    c, cat, dog = samples(tmp_path / "out" / "shards")
    assert [s.caption or "" for s in (c, cat, dog)] == ["", "a cat", "a dog"]
    assert [s.meta.get("class") for s in (c, cat, dog)] == [None, "cats", "dogs"]
    assert dog.meta["place"] == "x" and dog.meta["width"] == 64


def test_what_cannot_be_read_is_counted_by_name_and_the_rest_goes_on(tmp_path):
    photograph(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "c.heic").write_bytes(b"")
    (tmp_path / "in" / "._d.jpg").write_bytes(b"hidden")
    log = write_photographs(tmp_path / "in", tmp_path / "out", progress=False)
    assert log.counts == {"broken_image": 1, "not_read.heic": 1} and log.examples["broken_image"][0][2] == "b.jpg"
    assert len(samples(tmp_path / "out")) == 1


def test_a_killed_run_goes_on_with_the_tars_that_it_lacks_and_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("mmsae.look.photographs.PER_TAR", 2)
    for i in range(5):
        photograph(tmp_path / "in" / f"{i}.jpg", seed=i)
    write_photographs(tmp_path / "in", tmp_path / "whole", progress=False)
    made = []

    def killed(self, name, unit, *args, _real=__import__("mmsae.look.photographs", fromlist=["_unit"])._unit):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(name)
        return _real(self, name, unit, *args)

    monkeypatch.setattr("mmsae.look.photographs._unit", killed)
    with pytest.raises(KeyboardInterrupt):
        write_photographs(tmp_path / "in", tmp_path / "out", progress=False)
    monkeypatch.undo()
    monkeypatch.setattr("mmsae.look.photographs.PER_TAR", 2)
    first = next((tmp_path / "out").glob("*.tar"))
    stamp = first.stat().st_mtime_ns
    (tmp_path / "in").rename(tmp_path / "moved")  # the photographs are known by names and sizes, wherever they lie
    write_photographs(tmp_path / "moved", tmp_path / "out", progress=False)
    assert first.stat().st_mtime_ns == stamp
    for path in sorted((tmp_path / "whole").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_other_photographs_are_another_job(tmp_path):
    photograph(tmp_path / "in" / "a.jpg")
    write_photographs(tmp_path / "in", tmp_path / "out", progress=False)
    photograph(tmp_path / "in" / "b.jpg")
    with pytest.raises(InputError, match="another job: its photographs is"):
        write_photographs(tmp_path / "in", tmp_path / "out", progress=False)


def test_a_folder_without_images_is_said(tmp_path):
    (tmp_path / "a.heic").write_bytes(io.BytesIO().getvalue())
    with pytest.raises(InputError, match=r"has no image .*; it has 1 \.heic files, which are not read"):
        list_photographs(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        list_photographs(tmp_path / "none")


def test_nothing_but_broken_files_is_an_error(tmp_path):
    photograph(tmp_path / "in" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 1 samples"):
        write_photographs(tmp_path / "in", tmp_path / "out", progress=False)

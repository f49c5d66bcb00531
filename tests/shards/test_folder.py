import json
import pickle

import pytest

from mmsae.jobs.units import units
from mmsae.shards import FaultLog, count_samples, describe, expand, identity, read_shard, unit_batches
from mmsae.shards.folder import list_images
from mmsae.types import InputError


@pytest.fixture
def photos(tmp_path, make):
    """Seven images, their captions said in every way that is understood."""
    folder = tmp_path / "photos"
    (folder / "cats").mkdir(parents=True)
    (folder / ".thumbs").mkdir()
    for i, name in enumerate(["b.jpg", "a.png", "IMG.2024.01.JPG", "cats/c.jpeg", "cats/d.webp", "e.gif", "x.bmp"]):
        kind = {"jpg": "JPEG", "JPG": "JPEG", "jpeg": "JPEG"}.get(
            name.rsplit(".", 1)[1], name.rsplit(".", 1)[1].upper()
        )
        (folder / name).write_bytes(make.picture((30 * i, 0, 0), format=kind))
    (folder / "a.txt").write_text("says txt\n")
    (folder / "b.jpg.json").write_text('{"caption": "says json", "uid": "' + "A" * 32 + '"}')
    (folder / "IMG.2024.01.json").write_text('{"caption": ["one", "two"]}')
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / ".thumbs" / "t.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("of no image")
    return folder


def test_units_are_in_the_order_of_names_whatever_their_number(photos):
    one, three = expand(str(photos)), expand(f"{photos}/#files=3")
    assert [s.name for s in one] == ["photos#000000"] and [len(s.images) for s in three] == [3, 3, 1]
    assert [s.name for s in three] == ["photos#000000", "photos#000003", "photos#000006"]
    assert three[1] == f"{photos}#files=3-5"
    names = [i.name for s in three for i in s.images]
    assert names == sorted(names) == [i.name for i in one[0].images] and len(names) == 7
    read = [[s for u in found for s in read_shard(u, FaultLog(), need=("image",))] for found in (one, three)]
    assert [s.uid for s in read[0]] == [s.uid for s in read[1]]  # a uid does not depend on units
    assert [s.key for s in read[0]] == ["IMG_2024_01", "a", "b", "cats/c", "cats/d", "e", "x"]
    assert read[0][2].uid == "a" * 32 and all(s.image.size == (8, 6) for s in read[0])


def test_captions_beside_the_image_and_the_folder_as_label(photos):
    by_key = {s.key: s for s in read_shard(expand(str(photos))[0], FaultLog(), need=())}
    said = {"a": "says txt", "b": "says json", "IMG_2024_01": "one", "e": ""}
    assert {k: by_key[k].caption for k in said} == said
    assert by_key["cats/c"].meta == {"label": "cats"} and by_key["a"].meta == {}
    log = FaultLog()
    assert [s.key for s in read_shard(expand(str(photos))[0], log)] == ["IMG_2024_01", "a", "b"]
    assert log.counts == {"missing_caption": 4} and log.n_seen == 7


def test_faults_are_those_of_tars(photos, make):
    (photos / "a.png").write_bytes(make.picture(format="PNG")[:40])
    (photos / "b.jpg").write_bytes(b"")
    (photos / "e.gif").write_bytes(b"no image at all")
    (photos / "x.json").write_text("{broken")
    (photos / "x.txt").write_bytes(b"caf\xe9")
    (photos / "cats/c.txt").write_text(" ")
    unit = expand(str(photos))[0]
    (photos / "cats/d.webp").unlink()  # since it was listed
    log = FaultLog()
    assert [s.key for s in read_shard(unit, log)] == ["IMG_2024_01", "x"]
    assert log.counts == {"broken_image": 3, "missing_caption": 1, "empty_caption": 1, "broken_json": 1, "bad_utf8": 1}
    assert any(e[2] == "cats/d" and "No such file" in e[3] for e in log.examples["broken_image"])
    assert log.n_seen == 7


def test_names_that_would_be_one_key_are_told_apart(tmp_path, make):
    for name in ("a.jpg", "a.png", "a_png.jpg", "v.1.jpg", "v_1.jpg"):
        (tmp_path / name).write_bytes(make.picture())
    keys = {i.name: i.key for i in list_images(tmp_path).images}
    assert len(set(keys.values())) == 5 and all("." not in k for k in keys.values())
    assert keys["a.jpg"] == "a_jpg" and keys["a_png.jpg"] == "a_png" and keys["a.png"] == "a_png_2"
    uids = [s.uid for s in read_shard(expand(str(tmp_path))[0], FaultLog(), need=())]
    assert len(set(uids)) == 5


def test_the_identity_knows_what_changed(photos):
    before = expand(f"{photos}#files=4")
    assert identity(before) == identity(expand(f"{photos}#files=4"))
    (photos / "a.txt").write_text("says TXT\n")  # of the same size: not seen, as with a tar
    assert identity(before) == identity(expand(f"{photos}#files=4"))
    (photos / "x.txt").write_text("more")
    after = expand(f"{photos}#files=4")
    assert identity(before)[0] == identity(after)[0] and identity(before)[1] != identity(after)[1]
    assert units(before)[0].name == units(after)[0].name and units(before)[1].name != units(after)[1].name
    again = pickle.loads(pickle.dumps(after))
    assert identity(again) == identity(after) and again[1].images == after[1].images
    json.dumps(identity(after))


def test_two_folders_of_one_name_are_told_apart(tmp_path, make):
    for place in ("one/images", "two/images"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.png").write_bytes(make.picture())
    found = expand(f"{tmp_path}/{{one,two}}/images")
    assert [s.name for s in found] == ["one/images#000000", "two/images#000000"]
    assert len({s.uid for u in found for s in read_shard(u, FaultLog(), need=())}) == 2


def test_batches_and_counts(photos, make):
    for workers in (0, 2):
        packets = list(unit_batches(expand(f"{photos}#files=3"), make.transform, None, 2, workers=workers))
        keys = {k: [] for k in {p.path for p in packets}}
        for p in packets:
            keys[p.path] += p.batch.keys
        assert sorted(k for v in keys.values() for k in v) == sorted(
            ["IMG_2024_01", "a", "b", "cats/c", "cats/d", "e", "x"]
        )
    assert count_samples(str(photos)) == 7
    about = describe(str(photos))
    assert about["samples"] == 7 and about["exact"] and about["faults"]["counts"] == {"missing_caption": 2}


def test_what_is_no_folder_of_images_is_refused(tmp_path, make):
    with pytest.raises(InputError, match=r"holds 0 other tars\."):
        expand(str(tmp_path))
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"1 \.heic in it or below it, which are not read"):
        expand(str(tmp_path))
    (tmp_path / "b.png").write_bytes(make.picture())
    assert len(expand(str(tmp_path))) == 1
    with pytest.raises(InputError, match="files=0"):
        expand(f"{tmp_path}#files=0")
    (tmp_path / "more").mkdir()
    make.tar(tmp_path / "more" / "x.tar", make.pairs(1))
    with pytest.raises(InputError, match=r"1 \.tar in it or below it"):  # not a folder of images that holds tars too
        expand(str(tmp_path))
    assert expand(f"{tmp_path}/more") == [f"{tmp_path}/more/x.tar"]

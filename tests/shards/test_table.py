import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae.shards import FaultLog, count_samples, describe, expand, identity, read_shard, table, unit_batches
from mmsae.types import InputError


@pytest.fixture
def pictures(make):
    return [make.picture((20 * i, 0, 0), format=f) for i, f in enumerate(["PNG", "JPEG", "WEBP", "GIF", "PNG"])]


def written(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def structs(images):
    return pa.array([None if i is None else {"bytes": i, "path": "x.png"} for i in images])


def read(path, faults=None, **options):
    log = FaultLog() if faults is None else faults
    return [s for u in expand(str(path)) for s in read_shard(u, log, **options)]


@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
def test_the_image_is_a_struct_or_binary(tmp_path, pictures, kind):
    types = {"binary": pa.binary(), "large": pa.large_binary()}
    images = structs(pictures) if kind == "struct" else pa.array(pictures, types[kind])
    path = written(tmp_path / "a.parquet", {"image": images, "caption": [f"no {i}" for i in range(5)], "n": range(5)})
    found = read(path)
    assert [s.caption for s in found] == [f"no {i}" for i in range(5)]
    assert [next(iter(set(s.raw) - {"json", "txt"})) for s in found] == ["png", "jpg", "webp", "gif", "png"]
    assert [s.raw[f] for s, f in zip(found, ["png", "jpg", "webp", "gif", "png"], strict=True)] == pictures
    assert found[3].meta == {"caption": "no 3", "n": 3} and found[3].key == "000000003"
    assert found[0].image.size == (8, 6)


def test_lists_of_captions(tmp_path, pictures):
    several = [[f"{i}-{j}" for j in range(4)] for i in range(5)]
    columns = {
        "image": structs(pictures),
        "captions": several,
        "lang": [{"en": f"en {i}", "de": f"de {i}"} for i in range(5)],
        "sentences": [[{"raw": f"raw {i}{j}"} for j in range(3)] for i in range(5)],
    }
    path = written(tmp_path / "a.parquet", columns)

    def said(field=""):
        return [s.caption for s in read(path, caption_field=field)]

    assert said() == said("captions") == [f"{i}-0" for i in range(5)]
    assert said("captions[2]") == [f"{i}-2" for i in range(5)]
    assert said("lang[de]") == [f"de {i}" for i in range(5)]
    assert said("sentences[raw]") == [f"raw {i}0" for i in range(5)]
    assert said("sentences[raw][1]") == said("sentences[1][raw]") == [f"raw {i}1" for i in range(5)]
    drawn = said("captions[random]")
    assert all(c in several[i] for i, c in enumerate(drawn)) and drawn == said("captions[random:0]")
    assert len({tuple(said(f"captions[random:{s}]")) for s in range(6)}) > 3
    log = FaultLog()
    assert read(path, log, caption_field="captions[7]") == [] and log.counts == {"missing_caption": 5}
    for wrong in ("captions[", "captions[random:x]", "captions[]", "captions[0]x"):
        with pytest.raises(InputError, match="is not understood"):
            read(path, caption_field=wrong)


def test_nulls_and_broken_ones_are_counted(tmp_path, pictures):
    images = [None, b"", b"no image", *pictures]
    captions = ["a", "b", "c", None, " ", "ok", "fine", "good"]
    path = written(tmp_path / "a.parquet", {"image": structs(images), "caption": captions})
    log = FaultLog()
    assert [s.caption for s in read(path, log)] == ["ok", "fine", "good"]
    assert log.counts == {"missing_image": 1, "broken_image": 2, "missing_caption": 1, "empty_caption": 1}
    assert log.n_seen == 8 and log.examples["missing_image"][0][1:3] == ("a.parquet", "000000000")


def test_text_that_is_no_utf8_and_broken_json(tmp_path, pictures):
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"caf\xe9ok")]
    )
    columns = {"image": structs(pictures[:2]), "caption": bad, "json": ['{"uid": "' + "b" * 32 + '"}', "{broken"]}
    log = FaultLog()
    first, second = read(written(tmp_path / "a.parquet", columns), log)
    assert first.caption == "caf\ufffd" and first.uid == "b" * 32 and first.meta["caption"] == "caf\ufffd"
    assert second.caption == "ok" and log.counts == {"bad_utf8": 1, "broken_json": 1}


def test_columns_of_webdataset_and_labels(tmp_path, pictures):
    columns = {
        "__key__": ["a/1.x", "a/2"], "__url__": ["u", "u"], "jpg": structs(pictures[:2]), "txt": ["one", "two"],
        "json": [{"width": 3}, {"width": 4}], "cls": [7, None], "when": pa.array([0, 1], pa.timestamp("s")),
        "score": [float("nan"), 0.5], "thumb": pa.array([b"x", b"y"], pa.binary(1)),
    }  # fmt: skip
    first, second = read(written(tmp_path / "a.parquet", columns))
    assert (first.key, first.cls, first.caption) == ("a/1_x", 7, "one") and second.cls is None
    assert first.meta["width"] == 3 and first.meta["score"] is None and first.meta["when"] == "1970-01-01 00:00:00"
    assert not {"thumb", "__url__", "jpg"} & set(first.meta)


def test_a_column_that_is_not_there_names_those_that_are(tmp_path, pictures):
    images = structs(pictures)
    path = written(tmp_path / "a.parquet", {"front": images, "back": images, "words": ["w"] * 5})
    with pytest.raises(InputError, match=r"a\.parquet has no column side; it has front, back, words"):
        read(f"{path}#image=side")
    with pytest.raises(InputError, match="column words is of type string"):
        read(f"{path}#image=words")
    with pytest.raises(InputError, match=r"the columns front, back, words, and none of them is known as the image"):
        read(path, need=("image",))
    with pytest.raises(InputError, match=r"none of them is known as the caption: name it with --caption-field"):
        read(f"{path}#image=front")
    with pytest.raises(InputError, match=r"columns front, back, words, and no word, which --caption-field names"):
        read(f"{path}#image=front", caption_field="word")
    assert [s.caption for s in read(f"{path}#image=back", caption_field="words")] == ["w"] * 5
    one = written(tmp_path / "b.parquet", {"scan": images, "words": ["w"] * 5})
    assert len(read(one, need=("image",))) == 5  # the only column that can be it
    # a worker tells it as the main process would
    with pytest.raises(InputError, match="none of them is known as the image"):
        list(unit_batches(expand(path), lambda image: image, None, 2, workers=1))


def test_a_large_file_is_several_units_with_the_same_uids(tmp_path, make, monkeypatch):
    many = [make.picture((i, 0, 0)) for i in range(20)]
    columns = {"image": structs(many), "caption": [f"no {i}" for i in range(20)]}
    path = written(tmp_path / "a.parquet", columns, row_group_size=3)
    whole = read(path)
    bytes_of_group = sum(pq.read_metadata(path).row_group(0).column(c).total_compressed_size for c in range(3))
    monkeypatch.setattr(table, "UNIT_BYTES", int(bytes_of_group * 2.5))
    units = expand(path)
    assert [u.groups for u in units] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [u.name for u in units] == [f"a.parquet#{g:05d}" for g in (0, 2, 4, 6)]
    assert len({json.dumps(i) for i in identity(units)}) == 4
    parts = [s for u in pickle.loads(pickle.dumps(units)) for s in read_shard(u, FaultLog())]
    assert [(s.uid, s.key, s.caption) for s in parts] == [(s.uid, s.key, s.caption) for s in whole]
    assert count_samples(path) == 20 and sum(1 for _ in read_shard(units[1], FaultLog())) == 6
    about = describe(path)
    assert about["samples"] == 20 and about["faults"]["counts"] == {}


def test_cut_and_damaged_files(tmp_path, pictures):
    path = tmp_path / "a.parquet"
    written(path, {"image": structs(pictures), "caption": ["c"] * 5}, compression="none")
    data = path.read_bytes()
    for name, content, kind in [
        ("cut", data[:-50], "truncated_shard"),
        ("none", b"not parquet at all", "broken_shard"),
        ("empty", b"", "broken_shard"),
        ("footer", data[:-30] + b"\xff" * 22 + data[-8:], "broken_shard"),
        ("page", data[:4] + b"\xff" * 40 + data[44:], "broken_shard"),
    ]:
        (tmp_path / f"{name}.parquet").write_bytes(content)
        log = FaultLog()
        read(tmp_path / f"{name}.parquet", log)
        assert log.counts[kind] == 1 and log.n_seen >= 1, name


def test_tars_come_before_tables_and_tables_before_images(tmp_path, make, pictures, caplog):
    (tmp_path / "x.png").write_bytes(make.picture())
    assert expand(str(tmp_path))[0].kind == "images"
    written(tmp_path / "b.parquet", {"image": structs(pictures)})
    assert [s.kind for s in expand(str(tmp_path))] == ["table"]
    make.tar(tmp_path / "a.tar", make.pairs(1))
    assert [s.kind for s in expand(str(tmp_path))] == ["tar"] and "b.parquet" in caplog.text
    assert [s.kind for s in expand(f"{tmp_path}/*")] == ["tar", "table"]

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from mmsae.shards import FaultLog, make_uid, read_shard

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not here")


def read(path, **kw):
    log = FaultLog()
    return list(read_shard(path, log, **kw)), log


def test_a_good_shard(tmp_path, make):
    path = make.tar(tmp_path / "x.tar", make.pairs(3, json={"a": 1}, cls="4"))
    samples, log = read(path, source="web")
    assert [s.key for s in samples] == ["00000", "00001", "00002"]
    s = samples[1]
    assert (s.shard, s.caption, s.meta, s.cls, s.image.size) == ("x.tar", "picture 1", {"a": 1}, 4, (8, 6))
    assert s.uid == make_uid("web", "x.tar", "00001", {"a": 1}) and set(s.raw) == {"png", "txt", "json", "cls"}
    assert (log.n_seen, log.counts) == (3, {})


@pytest.mark.parametrize("field", ["jpg", "JPG", "jpeg", "webp"])
def test_image_fields(tmp_path, make, field):
    samples, _ = read(make.tar(tmp_path / "x.tar", [("a/b", {field: make.picture(), "txt": "t"})]))
    assert [s.key for s in samples] == ["a/b"] and samples[0].image.mode == "RGB"


def test_every_bad_sample_is_counted_by_kind_and_survived(tmp_path, make):
    good = make.picture()
    bad = [
        ("zero", {"png": b"", "txt": "t"}, "broken_image"),
        ("junk", {"png": b"junk", "txt": "t"}, "broken_image"),
        ("half", {"png": good[: len(good) // 2], "txt": "t"}, "broken_image"),
        ("blind", {"txt": "t"}, "missing_image"),
        ("mute", {"png": good}, "missing_caption"),
        ("blank", {"png": good, "txt": " \n"}, "empty_caption"),
        ("list", {"png": good, "json": {"caption": []}}, "empty_caption"),
    ]
    kept = [("cmyk", {"jpg": make.picture((0, 0, 0, 0), mode="CMYK", format="JPEG"), "txt": "t"}), *make.pairs(2)]
    noted = [("json", {"png": good, "txt": "t", "json": "{"}), ("utf8", {"png": good, "txt": b"caf\xe9"})]
    order = [(k, f) for k, f, _ in bad[:4]] + kept + [(k, f) for k, f, _ in bad[4:]] + noted
    samples, log = read(make.tar(tmp_path / "x.tar", order))
    assert [s.key for s in samples] == ["cmyk", "00000", "00001", "json", "utf8"]
    assert log.n_seen == len(order) and log.dropped == len(bad)
    examples = {key: (kind, shard) for kind, shard, key, _ in log.take().examples}
    assert examples == {
        **{key: (kind, "x.tar") for key, _, kind in bad},
        "json": ("broken_json", "x.tar"),
        "utf8": ("bad_utf8", "x.tar"),
    }


def test_what_is_not_needed_is_not_missed(tmp_path, make):
    path = make.tar(tmp_path / "x.tar", [("a", {"txt": "t"}), ("b", {"png": make.picture()}), *make.pairs(1)])
    assert [s.key for s in read(path, need=("caption",))[0]] == ["a", "00000"]
    images, log = read(path, need=("image",))
    assert [(s.key, s.caption) for s in images] == [("b", ""), ("00000", "picture 0")]
    assert log.counts == {"missing_image": 1}
    assert read(path, need=("json",))[1].counts == {"missing_json": 3}
    assert read(path, need=("cls",))[1].counts == {"missing_cls": 3}
    assert [s.image for s in read(path, decode=False)[0]] == [None]


def test_captions_from_json(tmp_path, make):
    image = make.picture()
    path = make.tar(
        tmp_path / "x.tar",
        [
            ("a", {"png": image, "txt": "short", "json": {"long": "a long one", "many": ["first", "second"]}}),
            ("b", {"png": image, "json": {"caption": "from json"}}),
        ],
    )
    assert [s.caption for s in read(path)[0]] == ["short", "from json"]
    assert [s.caption for s in read(path, caption_field="many")[0]] == ["first"]
    samples, log = read(path, caption_field="long")
    assert [s.caption for s in samples] == ["a long one"] and log.counts == {"missing_caption": 1}


def test_halves_of_surrogate_pairs_in_json_become_a_mark_and_are_noted(tmp_path, make):
    image = make.picture()
    half = b'{"caption": "party \\ud83c time", "question": ["a\\udc00"], "\\ud800": {"n": 1, "class": "c\\ud83d"}}'
    whole = b'{"caption": "party \\ud83c\\udf89 time \\u00e9"}'
    rows = [("half", {"png": image, "json": half}), ("meta", {"png": image, "txt": "t", "json": half})]
    samples, log = read(make.tar(tmp_path / "x.tar", [*rows, ("whole", {"png": image, "json": whole})]))
    assert [s.caption for s in samples] == ["party \ufffd time", "t", "party \U0001f389 time \u00e9"]
    assert samples[0].meta["question"] == ["a\ufffd"] and samples[0].meta["\ufffd"] == {"n": 1, "class": "c\ufffd"}
    assert json.dumps(samples[0].meta, ensure_ascii=False).encode()
    assert log.counts == {"bad_utf8": 2} and log.dropped == 0


@pytest.mark.parametrize("data", [b'{"caption": "caf\xe9"}', b'{"caption": ', b'["caption"]', b"[" * 100_000])
def test_a_json_that_held_the_caption_and_is_broken_is_called_broken(tmp_path, make, data):
    _, log = read(make.tar(tmp_path / "x.tar", [("a", {"png": make.picture(), "json": data})]))
    (kind, _, key, detail), *_ = log.take().examples
    assert (kind, key) == ("missing_caption", "a") and detail.startswith("broken json: ") and len(detail) < 150


def test_a_question_stands_for_a_caption_where_questions_are_read(tmp_path, make):
    image = make.picture()
    asked = {"png": image, "json": {"question": "is it red ?", "answer": "no"}}
    rows = [("a", asked), ("b", {**asked, "txt": "t"}), ("c", {**asked, "txt": " "}), ("d", {"png": image, "txt": "t"})]
    rows += [
        ("e", {"png": image, "json": {"question": ["what ?", "who ?"]}}),
        ("f", {"png": image, "json": {"answer": "no"}}),
    ]
    path = make.tar(tmp_path / "x.tar", [*rows, ("g", {"png": image})])
    samples, log = read(path, need=("image", "question"))
    assert [(s.key, s.caption) for s in samples] == [
        *(("a", "is it red ?"), ("b", "t"), ("c", "is it red ?"), ("d", "t"), ("e", "what ?"))
    ]
    assert log.counts == {"missing_caption": 2}
    assert [s.key for s in read(path)[0]] == ["b", "d"]


def test_uids(tmp_path, make):
    uid = "0123456789abcdef" * 2
    assert make_uid("s", "x.tar", "k", {"uid": uid}) == make_uid("", "y", "z", {"uid": uid.upper()}) == uid
    made = [make_uid("s", "x.tar", "k", {}), make_uid("s", "x.tar", "k", {"uid": "short"})]
    assert made[0] == made[1] and len(made[0]) == 32 and int(made[0], 16)
    assert len({make_uid("s", "x.tar", "k", {}), make_uid("sx", ".tar", "k", {}), make_uid("", "x.tar", "k", {})}) == 3


def test_the_same_key_twice_gives_the_same_uid_twice(tmp_path, make):
    samples, _ = read(make.tar(tmp_path / "x.tar", make.pairs(1) + make.pairs(1)))
    assert len(samples) == 2 and samples[0].uid == samples[1].uid


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled(tmp_path, make):
    bomb = pickle.dumps(Bomb())
    with pytest.raises(SystemExit):
        pickle.loads(bomb)
    fields = {"pyd": bomb, "pth": bomb, "pickle": bomb, "npy": bomb, "png": make.picture(), "txt": "t", "json": bomb}
    samples, log = read(make.tar(tmp_path / "x.tar", [("a", fields)]))
    assert samples[0].raw["pth"] == bomb and log.counts == {"broken_json": 1}


def test_other_members_are_passed_over(tmp_path, make):
    path = Path(make.tar(tmp_path / "x.tar", [("__index__/0", {"json": "{}"}), *make.pairs(1)]))
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("sub.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("._hidden.png"))
        archive.addfile(tarfile.TarInfo("no_extension"))
    samples, log = read(path)
    assert [s.key for s in samples] == ["00000"] and log.n_seen == 1


def test_a_tar_cut_anywhere_gives_all_that_is_complete_and_is_counted(tmp_path, make):
    whole = Path(make.tar(tmp_path / "whole.tar", make.pairs(4, json={"i": 0})))
    with tarfile.open(whole) as archive:
        ends = [m.offset_data + m.size for m in archive.getmembers()]
    data, path = whole.read_bytes(), tmp_path / "cut.tar"
    end = 512 * -(-ends[-1] // 512)
    for cut in sorted({*range(0, end + 1, 256), *ends, *(e - 1 for e in ends)}):
        path.write_bytes(data[:cut])
        samples, log = read(path)
        complete = sum(e <= cut for e in ends[2::3])
        if complete == 1 and cut < 512 * -(-ends[2] // 512) + 512:
            complete = 0  # of the only sample there is, nobody knows which fields it should have
        assert [s.key for s in samples] == [f"{i:05d}" for i in range(complete)], cut
        assert log.counts == {"truncated_shard": 1} and log.n_seen == complete + 1, cut
        assert log.take().examples[0][1] == "cut.tar"
    path.write_bytes(data[: end + 512])  # the end mark is there, the padding after it does not matter
    assert read(path)[1].counts == {}


def test_a_gzipped_tar_cut_anywhere(tmp_path, make):
    pairs = [(k, {**f, "bin": bytes(range(256)) * (i + 3)}) for i, (k, f) in enumerate(make.pairs(40))]
    whole = Path(make.tar(tmp_path / "whole.tar.gz", pairs))
    assert len(read(whole)[0]) == 40
    data, path, before = whole.read_bytes(), tmp_path / "cut.tar.gz", 0
    for cut in range(0, len(data) - 60, 97):
        path.write_bytes(data[:cut])
        samples, log = read(path)
        assert [s.key for s in samples] == [f"{i:05d}" for i in range(len(samples))]
        assert log.counts == {"truncated_shard": 1}
        assert len(samples) >= before
        before = len(samples)
    assert before >= 30


def test_damaged_archives_are_counted(tmp_path, make):
    data = bytearray(Path(make.tar(tmp_path / "x.tar", make.pairs(4))).read_bytes())
    with tarfile.open(tmp_path / "x.tar") as archive:
        header = archive.getmember("00002.png").offset
    data[header + 10] ^= 255
    (tmp_path / "bad.tar").write_bytes(data)
    samples, log = read(tmp_path / "bad.tar")
    assert len(samples) == 2 and log.counts == {"broken_shard": 1}
    (tmp_path / "html.tar").write_bytes(b"<html>" * 500)
    assert read(tmp_path / "html.tar")[1].counts == {"broken_shard": 1}
    packed = bytearray(Path(make.tar(tmp_path / "y.tar.gz", make.pairs(4))).read_bytes())
    packed[len(packed) // 2] ^= 255
    (tmp_path / "bad.tar.gz").write_bytes(packed)
    assert sum(read(tmp_path / "bad.tar.gz")[1].counts.values()) >= 1
    (tmp_path / "empty.tar").write_bytes(b"")
    assert read(tmp_path / "empty.tar")[1].counts == {"truncated_shard": 1}
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "gone.tar")


def test_compression_is_seen_by_content(tmp_path, make):
    assert len(read(make.tar(tmp_path / "x.tar", make.pairs(2), gz=True))[0]) == 2


def test_memory_does_not_hold_the_headers_of_the_archive(tmp_path, make, monkeypatch):
    longest = 0
    advance = tarfile.TarFile.next

    def counting(self):
        nonlocal longest
        longest = max(longest, len(self.members))
        return advance(self)

    path = make.tar(tmp_path / "x.tar", make.pairs(20))
    monkeypatch.setattr(tarfile.TarFile, "next", counting)
    assert len(read(path)[0]) == 20 and longest <= 1


@needs_data
@pytest.mark.parametrize(
    "name", ["cifar10/cifar10-test-000000", "nlvr/nlvr-dev-000000", "captioned_vi/captioned_vi-000001"]
)
def test_real_shards_are_read_as_tarfile_reads_them(name):
    path = DATA / f"{name}.tar.gz"
    samples, log = read(path, decode=False)
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive}
    captions = {n.removesuffix(".txt"): d.decode().strip() for n, d in files.items() if n.endswith(".txt")}
    assert {s.key: s.caption for s in samples} == captions and log.counts == {}
    for s in samples[:50]:
        assert s.meta == json.loads(files[f"{s.key}.json"]) and s.raw.keys() == {
            n.split(".", 1)[1] for n in files if n.split(".", 1)[0] == s.key
        }


@needs_data
def test_a_real_shard_cut_in_the_middle(tmp_path):
    data = (DATA / "coco_mini" / "coco_mini-train-000000.tar.gz").read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(data[: len(data) // 2])
    samples, log = read(tmp_path / "half.tar.gz")
    assert 30 <= len(samples) < 80 and log.counts == {"truncated_shard": 1}
    assert io.BytesIO(samples[-1].raw["jpg"]).getbuffer().nbytes and samples[-1].caption

"""Stores: what is written is read, whatever is wrong with a folder is said, and nothing half-written is a store."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmsae.activations import ActivationStore, StoreSpec, StoreWriter, describe_store, write_store
from mmsae.types import InputError, Site, Tokens
from tests.helpers.stores import contents

N, D = 50, 5


@pytest.fixture
def x():
    g = torch.Generator().manual_seed(0)
    return {m: torch.randn(N, D, generator=g) for m in ("image", "text")}


@pytest.fixture
def store(tmp_path, x):
    return write_store(tmp_path / "store", x, captions=[f"c{i}" for i in range(N)], rows_per_shard=20)


def test_what_is_written_is_read(store, x):
    s = ActivationStore(store)
    assert torch.equal(s.load(modality="image"), x["image"]) and torch.equal(s.load(modality="text"), x["text"])
    assert len(s) == N and s.d_in == D and s.modalities == ["image", "text"]
    assert s.captions[7] == "c7" and len(set(s.uids)) == N and len(s.uids[0]) == 32
    assert s.sites["text"].width == D


def test_shards_are_plain_safetensors(store, x):
    parts = [load_file(store / f"shard-0000{i}.safetensors") for i in range(3)]
    assert torch.equal(torch.cat([p["text"] for p in parts]), x["text"])


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
def test_dtypes_round_once(tmp_path, x, dtype, bits):
    s = ActivationStore(write_store(tmp_path / "s", {"image": x["image"]}, dtype=dtype))
    got = s.load()
    assert got.dtype == torch.float32
    assert torch.equal(got, x["image"].to(getattr(torch, dtype)).float())
    assert ((got - x["image"]).abs() <= x["image"].abs() * 2.0**-bits).all()


def test_rows_in_any_order_over_shards(store, x):
    s = ActivationStore(store)
    idx = np.random.default_rng(0).permutation(N)
    assert torch.equal(s.rows("image", idx), x["image"][idx])
    assert s.rows("image", idx[:0]).shape == (0, D)
    with pytest.raises(IndexError):
        s.rows("image", np.array([N]))


def test_load_by_uid_keeps_the_order_asked_for(store, x):
    s = ActivationStore(store)
    pick = [33, 2, 49, 20]
    assert torch.equal(s.load(modality="text", uids=[s.uids[i] for i in pick]), x["text"][pick])
    with pytest.raises(InputError, match="uid nobody is not among the 50 items"):
        s.load(modality="text", uids=["nobody"])


def test_a_paired_store_asks_which_modality(store):
    with pytest.raises(InputError, match=r"holds 2 sites.*image.*text"):
        ActivationStore(store).load()


def test_the_same_data_gives_the_same_bytes(tmp_path, store, x):
    again = write_store(tmp_path / "again", x, captions=[f"c{i}" for i in range(N)], rows_per_shard=20)
    assert contents(again) == contents(store)


def test_sizes_of_one_modality_may_differ(tmp_path):
    s = ActivationStore(write_store(tmp_path / "s", {"image": torch.ones(4, 3), "text": torch.ones(4, 2)}))
    assert s.d_in == {"image": 3, "text": 2}


def test_token_sites_have_several_rows_per_item(tmp_path):
    item = torch.tensor([0, 0, 1, 1, 1, 3, 4, 4])
    x = torch.arange(8.0)[:, None].expand(8, 2)
    s = ActivationStore(
        write_store(tmp_path / "s", {"image": x}, list("abcde"), items={"image": item}, rows_per_shard=2)
    )
    assert torch.equal(s.load(), x)
    assert s.load(uids=["e", "b", "c"])[:, 0].tolist() == [6, 7, 2, 3, 4]  # item c has no row
    t = s.tokens({"image": "image"}, {"image": np.array([7, 0, 5, 1])})
    assert [t.uids[i] for i in t.item["image"]] == ["e", "a", "d", "a"]


def test_several_sites_of_one_modality(tmp_path):
    sites = {f"image/{b}": Site("h", f"block.{b}", modality="image", width=2) for b in (0, 1)}
    writer = StoreWriter(tmp_path / "s", sites)
    with writer.part(0) as part:
        part.add({n: torch.full((3, 2), float(i)) for i, n in enumerate(sites)}, list("abc"))
    s = ActivationStore(writer.finish())
    assert s.load(site="block.1").unique().item() == 1 and s.load(site=sites["image/0"]).unique().item() == 0
    with pytest.raises(InputError, match="holds 2 sites"):
        s.load(modality="image")
    assert s.spec.choose({"image": "block.1"}) == s.spec.choose("block.1") == {"image": "image/1"}
    assert s.spec.d_in("block.1") == 2 and s.spec.own("image", {"image": sites["image/0"]}) == "image/0"
    with pytest.raises(InputError, match="holds 2 sites"):
        s.spec.own("image", {})


def test_position_and_special_come_back(tmp_path):
    site = {"image": Site("h", "b", tokens="all", modality="image", width=1)}
    writer = StoreWriter(tmp_path / "s", site, units=2)
    with writer.part(0):
        pass  # a tar without one good sample
    with writer.part(1) as part:
        item, position = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
        x = (10 * item + position)[:, None].float()
        part.add(Tokens({"image": x}, {"image": item}, None, {"image": position}, {"image": position == 0}), ["a", "b"])
    s = ActivationStore(writer.finish())
    t = s.tokens({"image": "image"}, {"image": np.arange(4)})
    assert t.x["image"][:, 0].tolist() == [0, 1, 10, 11]  # rows of an item lie together
    assert t.position["image"].tolist() == [0, 1, 0, 1] and t.special["image"].tolist() == [True, False, True, False]


# What is wrong with a folder.


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00002.parquet"])
def test_a_changed_byte_is_refused_when_opened(store, name):
    data = bytearray((store / name).read_bytes())
    data[-3] ^= 1
    (store / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: content hash is [0-9a-f]+, the store's spec says"):
        ActivationStore(store)
    ActivationStore(store, verify=False)


@pytest.mark.parametrize("change", ["cut", "missing"])
def test_a_file_of_another_size_is_refused_even_unverified(store, change):
    path = store / "shard-00001.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1]) if change == "cut" else path.unlink()
    with pytest.raises(InputError, match=f"shard-00001.*{size} bytes"):
        ActivationStore(store, verify=False)


def test_a_changed_spec_is_refused(store):
    path = store / "spec.json"
    path.write_text(path.read_text().replace('"width": 5', '"width": 6', 1))
    with pytest.raises(InputError, match="content hash"):
        StoreSpec.load(store)


def test_a_newer_format_is_refused(store):
    path = store / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(InputError, match="99 is newer than 1"):
        ActivationStore(store)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other", "format_version": 1}', '{"format": 3}'])
def test_a_damaged_spec_is_one_sentence(store, text):
    (store / "spec.json").write_text(text)
    with pytest.raises(InputError, match=r"spec\.json"):
        ActivationStore(store)


def test_what_is_no_store_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {"": "no activation store is given", tmp_path / "no": "no such folder", tmp_path / "empty": "not an"}
    for folder, words in cases.items():
        with pytest.raises(InputError, match=words):
            ActivationStore(folder)


def test_a_store_without_its_spec_is_unfinished(tmp_path, x):
    writer = StoreWriter(tmp_path / "s", {"image": Site("h", "m", width=D)}, units=2)
    with writer.part(0) as part:
        part.add({"image": x["image"]}, [str(i) for i in range(N)])
    with pytest.raises(InputError, match="1 of 2 shards are done"):
        ActivationStore(tmp_path / "s")
    with pytest.raises(InputError, match="1 of 2 parts"):
        writer.finish()


def test_a_part_that_fails_leaves_nothing(tmp_path, x):
    writer = StoreWriter(tmp_path / "s", {"image": Site("h", "m", width=D)})
    with pytest.raises(ZeroDivisionError), writer.part(0) as part:
        part.add({"image": x["image"]}, [str(i) for i in range(N)])
        raise ZeroDivisionError
    assert set(contents(tmp_path / "s")) == {"job.json"} and not writer.done(0)


def test_a_part_has_one_writer(tmp_path):
    writer = StoreWriter(tmp_path / "s", {"image": Site("h", "m", width=D)})
    with writer.part(0) as part:
        part.add({"image": torch.ones(1, D)}, ["a"])
        with pytest.raises(InputError, match="another running process"):
            StoreWriter(tmp_path / "s", {"image": Site("h", "m", width=D)}).open_part(0)


def test_giving_up_does_not_disturb_another_process(tmp_path):
    writer, other = (StoreWriter(tmp_path / "s", {"image": Site("h", "m", width=D)}) for _ in range(2))
    with writer.part(0) as part:
        part.add({"image": torch.ones(1, D)}, ["a"])
        other.discard()
    assert len(ActivationStore(writer.finish())) == 1


def test_stores_are_never_changed(store, x, tmp_path):
    before = contents(store)
    with pytest.raises(InputError, match="already holds an activation store"):
        write_store(store, x, rows_per_shard=20)
    with pytest.raises(InputError, match="another job"):
        write_store(store, {"image": x["image"]})
    assert contents(store) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no result of mmsae extract"):
        write_store(tmp_path / "other", x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": {"image": torch.full((3, 2), 1e6)}, "dtype": "float16"}, "1e\\+06 is beyond float16"),
        ({"x": {"image": torch.ones(3, 2), "text": torch.ones(4, 2)}}, "'image': 3, 'text': 4"),
        ({"x": {"image": torch.ones(3, 2)}, "uids": ["a", "b"]}, "for 2 uids"),
        ({"x": {"image": torch.ones(3, 2)}, "uids": ["a", "b", "a"]}, "uid a occurs twice"),
        (
            {"x": {"image": torch.ones(3, 2)}, "uids": ["a", "b", "a"], "rows_per_shard": 1},
            "in shard-00000.*shard-00002",
        ),
        ({"x": {"image": torch.ones(0, 2)}}, "not one usable sample"),
        ({"x": {"image": torch.ones(3, 2)}, "dtype": "int8"}, "dtype int8"),
    ],
    ids=["overflow", "rows", "uids", "duplicate", "duplicate over shards", "empty", "dtype"],
)
def test_wrong_input_leaves_no_folder(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        write_store(tmp_path / "s", **change)
    assert not (tmp_path / "s").exists()


def test_describe(store):
    d = describe_store(store)
    assert d["items"] == N and d["sites"]["image"]["rows"] == N and d["dtype"] == "float32" and d["shards"] == 3
    assert d["verified"] == "content"
    json.dumps(d)

import io

import numpy as np
import pytest
from PIL import Image

from mmsae.shards import FaultLog, ShardWriter, expand, read_shard
from mmsae.types import InputError
from mmsae.world.generator.data import generate
from mmsae.world.generator.shards import write_world
from mmsae.world.models.options import PairData
from mmsae.world.models.pairs import epoch_order, flip_and_shift, load_pairs


def png(size=(8, 8), colour=(10, 20, 30)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def shard(folder, samples):
    with ShardWriter(folder, "t") as w:
        for i, s in enumerate(samples):
            w.write(f"{i:03d}", s)
    return str(folder / "t-*.tar")


@pytest.fixture(scope="module")
def world_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder, 50, seed=3, prefix="w", per_shard=20, progress=False)


def test_world_shards_read_back_as_they_were_generated(world_shards):
    folder, data = world_shards
    samples = [s for p in expand(str(folder / "w-*.tar")) for s in read_shard(p, FaultLog())]
    assert [s.uid for s in samples] == data.uids and [s.caption for s in samples] == data.full
    assert np.array_equal(np.stack([np.asarray(s.image) for s in samples]), data.images)
    assert [s.meta for s in samples] == [data.meta(i) for i in range(50)]


def test_world_shards_have_equal_bytes_for_equal_arguments(world_shards, tmp_path):
    folder, _ = world_shards
    write_world(tmp_path, 50, seed=3, prefix="w", per_shard=20, progress=False)
    files = sorted(p.name for p in folder.iterdir())
    assert files == ["w-000000.tar", "w-000001.tar", "w-000002.tar"]
    assert all((folder / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)


def test_pairs_of_the_world(world_shards):
    folder, data = world_shards
    pairs = load_pairs(str(folder), 32, progress=False)
    assert np.array_equal(pairs.images, data.images)
    told = [[pairs.texts[c] for c in row] for row in pairs.captions]
    assert told == [list(t) for t in zip(data.full, data.partial, strict=True)]
    assert (pairs.counts == 2).all() and len(set(pairs.texts)) == len(pairs.texts)
    assert np.array_equal(pairs.group - pairs.group[0], data.scenes.pair)
    assert pairs.digest() == load_pairs(str(folder), 32, progress=False).digest()


def test_captions_come_from_the_list_else_from_txt_else_from_the_named_field(tmp_path):
    shards = shard(
        tmp_path,
        [
            {"png": png(), "txt": "one", "json": {"captions": ["two", " three ", ""], "other": "four"}},
            {"png": png(), "txt": "one", "json": {"other": "five"}},
        ],
    )
    pairs = load_pairs(shards, 8, progress=False)
    assert pairs.texts == ["two", "three", "one"] and pairs.counts.tolist() == [2, 1]
    assert pairs.captions.tolist() == [[0, 1], [2, 2]] and len(set(pairs.group)) == 2
    assert load_pairs(shards, 8, data=PairData(caption_field="other"), progress=False).texts == ["four", "five"]


def test_other_sizes_are_resized_and_cut_to_the_middle(tmp_path):
    wide = np.zeros((8, 32, 3), np.uint8)
    wide[:, 12:20] = 200
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "PNG")
    pairs = load_pairs(shard(tmp_path, [{"png": out.getvalue(), "txt": "a"}, {"png": png((5, 9)), "txt": "b"}]), 8)
    assert (pairs.images[0] == 200).all() and (pairs.images[1] == (10, 20, 30)).all()


def test_what_cannot_be_used_is_refused_or_counted(tmp_path):
    good = {"png": png(), "txt": "a"}
    shards = shard(tmp_path / "a", [good] * 40 + [{"png": b"", "txt": "a"}, {"png": png()}])
    pairs = load_pairs(shards, 8, progress=False)
    assert len(pairs.images) == 40 and pairs.faults.to_dict()["counts"] == {"broken_image": 1, "missing_caption": 1}
    with pytest.raises(InputError, match=r"dropped"):
        load_pairs(shards, 8, data=PairData(fault_limit=0.01), progress=False)
    with pytest.raises(InputError, match=r"more than the 20 images of 8 x 8"):
        load_pairs(shards, 8, data=PairData(max_gigabytes=20 * 192 / 1e9), progress=False)
    with pytest.raises(InputError, match="holds 1 readable pairs"):
        load_pairs(shard(tmp_path / "b", [good]), 8, progress=False)


def test_every_epoch_has_a_new_order_in_which_siblings_are_neighbours():
    group = np.array([1, 1, 2, 3, 3, 3, 4, 5, 5])
    orders = [epoch_order(group, seed=0, epoch=e) for e in range(5)]
    for order in orders:
        assert sorted(order) == list(range(9))
        assert (np.diff(group[order]) != 0).sum() == 4
    assert len({tuple(o) for o in orders}) > 1
    assert np.array_equal(orders[3], epoch_order(group, seed=0, epoch=3))
    assert not np.array_equal(epoch_order(group, 0, 0), epoch_order(group, 1, 0))


def test_augmentation_mirrors_and_shifts_with_repeated_edges():
    images = np.random.default_rng(0).integers(0, 256, (200, 20, 20, 3), dtype=np.uint8)
    out = flip_and_shift(images, np.random.default_rng(1))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    seen = set()
    for i in range(200):
        moves = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (1, -1)
            if np.array_equal(out[i], padded[i, dy : dy + 20, dx : dx + 20][:, ::flip])
        ]
        assert len(moves) == 1
        seen.add(moves[0])
    assert len(seen) > 40, "all shifts, mirrored or not, occur"


def test_generated_data_needs_no_shards():
    assert generate(4, 0).images.shape == (4, 32, 32, 3)

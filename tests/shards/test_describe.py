from pathlib import Path

import pytest

from mmsae.shards import count_samples, describe
from mmsae.types import InputError

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_describe(tmp_path, make, suffix):
    make.tar(tmp_path / f"a{suffix}", make.pairs(6, json={"url": "u"}))
    make.tar(tmp_path / f"b{suffix}", [*make.pairs(2), ("zero", {"png": b"", "txt": "t"}), ("blind", {"txt": "t"})])
    found = describe(str(tmp_path))
    assert (found["shards"], found["samples"], found["exact"]) == (2, 10, True)
    assert found["samples_per_shard"] == {"min": 4, "mean": 5.0, "max": 6}
    assert found["keys"] == {"txt": 10, "png": 9, "json": 6}
    assert found["mean_bytes"]["json"] == len('{"url": "u"}')
    assert found["captions"] == [f"picture {i}" for i in range(5)]
    assert found["json_fields"] == ["url"] and found["image_sizes"] == [[8, 6]]
    assert found["faults"]["counts"] == {"broken_image": 1, "missing_image": 1}
    assert found["bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert count_samples(str(tmp_path)) == 10


def test_a_part_of_many_shards_is_scaled_up(tmp_path, make):
    for i in range(10):
        make.tar(tmp_path / f"{i}.tar", make.pairs(4))
    found = describe(str(tmp_path), max_shards=3)
    assert (found["samples"], found["exact"], found["shards"], found["shards_read"]) == (40, False, 10, 3)


def test_a_truncated_shard_is_told(tmp_path, make):
    path = Path(make.tar(tmp_path / "x.tar", make.pairs(4)))
    path.write_bytes(path.read_bytes()[:5000])
    found = describe(str(path))
    assert found["faults"]["counts"] == {"truncated_shard": 1} and found["samples"] == 2


def test_nothing_to_describe(tmp_path):
    with pytest.raises(InputError, match="No shard matches"):
        describe(str(tmp_path / "*.tar"))


@pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not here")
def test_a_real_set():
    found = describe(str(DATA / "nlvr"))
    assert (found["samples"], found["image_sizes"], found["faults"]["counts"]) == (985, [[400, 100]], {})
    assert found["keys"] == dict.fromkeys(("png", "txt", "cls", "json"), 985)

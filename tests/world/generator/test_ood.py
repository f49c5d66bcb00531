import numpy as np

from mmsae.shards import FaultLog, expand, read_shard
from mmsae.world.generator.ood import checker, digits, lone_objects, write_ood_sets


def test_sets_are_written_whole_with_their_classes(tmp_path):
    folders = write_ood_sets(tmp_path, 60, 5)
    assert set(folders) == {"id", "digits", "noise", "checker"}
    found = {}
    for name, folder in folders.items():
        samples = [s for p in expand(folder) for s in read_shard(p, FaultLog())]
        assert all(s.image.size == (32, 32) for s in samples)
        found[name] = {s.meta["class"] for s in samples}, len(samples)
    n = found["id"][1]
    assert 25 < n < 50 and found["digits"][1] == found["noise"][1] == n // 2
    assert all(len(c.split()) == 2 for c in found["id"][0]) and "digit 3" in found["digits"][0]
    assert not found["id"][0] & found["checker"][0]


def test_the_checkerboard_is_faint_and_regular():
    images, _ = lone_objects(20, 1)
    step = checker(images).astype(int) - images
    assert np.abs(step).max() == 30 and (step[:, :4, :4] <= 0).all() and (step[:, :4, 4:8] >= 0).all()
    inside = (images > 30) & (images < 225)
    assert set(np.abs(step[inside])) == {30}


def test_the_same_seed_writes_the_same_pictures():
    (a, x), (b, y) = lone_objects(30, 3), lone_objects(30, 3)
    assert np.array_equal(a, b) and x == y
    assert digits(7)[0].shape == (7, 32, 32, 3)

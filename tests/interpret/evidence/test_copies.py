import numpy as np
from PIL import Image, ImageDraw

from mmsae.interpret.evidence.copies import common_groups, equal_groups, first_of_group, near_groups
from mmsae.interpret.evidence.marks import difference_hash, mean_colours, text_hash


def photo(seed, size=(96, 72)):
    """Smooth random colours, as photographs have."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def groups(images):
    dhash = np.array([difference_hash(i) for i in images])
    signature = np.stack([mean_colours(i).numpy() for i in images])
    return near_groups(dhash, signature, np.ones(len(images), np.uint8))


def test_resized_and_recompressed_images_are_copies_and_others_are_not():
    images = [photo(i) for i in range(40)]
    again = [images[3].resize((48, 36)), images[7].resize((130, 99), Image.Resampling.LANCZOS), images[3].copy()]
    found = groups([*images, *again])
    assert found[40] == found[42] == found[3] == 3 and found[41] == 7
    assert (found[:40] == np.arange(40)).all()


def test_scenes_that_differ_in_one_object_are_two():
    def scene(colour, x):
        image = Image.new("RGB", (64, 64), (200, 200, 200))
        ImageDraw.Draw(image).ellipse((x, 20, x + 14, 34), fill=colour)
        return image

    images = [scene(c, x) for c in ("red", "blue", "green") for x in (10, 40)]
    assert len(set(groups(images))) == 6
    assert len(set(groups([*images, *images]))) == 6


def test_many_flat_images_are_compared_in_bounded_time():
    images = [Image.new("RGB", (8, 8), (i % 256, 0, 0)) for i in range(3000)]
    found = groups(images)
    assert len(set(found[:256])) < 30  # near by brightness
    assert (found[256:512] == found[:256]).all()  # exact copies, wherever they lie


def test_groups_agree_with_all_pairs():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**62, 60)
    flips = np.array([sum(1 << int(b) for b in rng.choice(62, n, replace=False)) for n in rng.integers(0, 6, 60)])
    dhash = np.concatenate([base, base ^ flips])
    signature = np.zeros((120, 16, 16, 3), np.uint8)
    signature[:, 0, 0, 0] = rng.integers(0, 40, 120)
    found = near_groups(dhash, signature, np.ones(120, np.uint8))
    near = np.bitwise_count(dhash[:, None] ^ dhash[None]) <= 3
    near &= np.abs(signature[:, None].astype(int) - signature[None]).max((2, 3, 4)) <= 24
    reach = np.linalg.matrix_power(near.astype(float), 32) > 0
    assert ((found[:, None] == found[None]) == reach).all() and 0 < near.sum() - 120 < 120
    alone = near_groups(dhash, signature, np.zeros(120, np.uint8))
    assert (alone == np.arange(120)).all()  # without images


def test_captions_are_compared_as_they_read():
    same = ["A red circle.", "a  red circle", "A red-circle!", "ein roter Kreis"]
    keys = np.array([text_hash(t) for t in [*same, "", "  ", "!?", "!!"]])
    assert len(set(keys[:3])) == 1 and keys[3] != keys[0]
    assert keys[4] == keys[5] == 0 and keys[6] != keys[7]
    assert equal_groups(keys).tolist() == [0, 0, 0, 3, 4, 5, 6, 7]


def test_the_smallest_rank_stands_for_a_group():
    group, rank = np.array([0, 1, 0, 0, 4, 1]), np.array([5, 1, 3, 4, 0, 2])
    assert first_of_group(group, rank).tolist() == [2, -1, -1, 2, -1, 1]
    both = common_groups([group, np.array([0, 1, 0, 3, 4, 5])])
    assert both[0] == both[2] and len(set(both)) == 5

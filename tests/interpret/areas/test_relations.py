import numpy as np
import pytest

from mmsae.errors import InputError
from mmsae.interpret.areas.relations import CorpusAreas
from mmsae.interpret.evidence.folder import Evidence
from mmsae.metrics.concepts.query import evaluate
from tests.helpers.areas import D, drawn, scene
from tests.helpers.evidence import write_evidence


def corpus(scenes, n=None):
    z = np.stack(scenes)
    item, r, c, latent = np.nonzero(z)
    return CorpusAreas(item, latent, r * z.shape[2] + c, z[item, r, c, latent], n or len(z), z.shape[1:3])


def random_scenes(n=40):
    """Scenes of latents 1 and 2 in one to three places each, which may overlap."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(n):
        shapes = [
            (j, *rng.integers(1, 9, 2), *rng.integers(2, 5, 2)) for j in (1, 2) for _ in range(rng.integers(1, 4))
        ]
        out.append(scene(shapes)[0])
    return out


def test_counts_are_those_of_the_shapes():
    scenes = [scene([(4, *s[1:]) for s in drawn(n, seed)])[0] for n in range(1, 7) for seed in range(4)]
    found = corpus(scenes)
    assert found.count([4]).tolist() == [n for n in range(1, 7) for _ in range(4)]
    assert not found.count([5]).any() and not found.left_of([4], [5]).any() and not found.overlap([5], [4]).any()


def test_counts_of_all_latents_at_once_are_those_of_each():
    found = corpus([*random_scenes(), scene([(4, *s[1:]) for s in drawn(3, 0)])[0]])
    latent, item, count = found.counts()
    assert (np.diff(latent * found.n + item) > 0).all() and (count > 0).all()
    for j in range(D):
        own = np.zeros(found.n)
        own[item[latent == j]] = count[latent == j]
        assert np.array_equal(own, found.count([j]))
    assert found.count([1, 2]).any() and not np.array_equal(found.count([1, 2]), found.count([1]) + found.count([2]))


def test_left_of_is_antisymmetric_mirrored_by_a_flip_and_unmoved_by_a_shift():
    scenes = random_scenes()
    found, flipped = corpus(scenes), corpus([s[:, ::-1] for s in scenes])
    moved = corpus([np.roll(s, (2, 3), (0, 1)) for s in scenes])
    signed = found.signed_left([1], [2])
    assert (np.abs(signed) > 0).mean() > 0.5
    assert np.allclose(signed, -found.signed_left([2], [1]))
    assert np.allclose(signed, -flipped.signed_left([1], [2]), atol=1e-5)
    assert np.allclose(signed, moved.signed_left([1], [2]), atol=1e-5)
    assert not ((found.left_of([1], [2]) > 0) & (found.left_of([2], [1]) > 0)).any()
    clear = corpus([scene([(1, 4, 1, 3, 3), (2, 4, 9, 3, 3)])[0], scene([(1, 1, 4, 3, 3), (2, 9, 4, 3, 3)])[0]])
    assert clear.left_of([1], [2]).tolist() == [1, 0] and clear.left_of([2], [1]).tolist() == [0, 0]


def test_overlap_is_symmetric_and_unmoved_by_flips_and_shifts():
    scenes = random_scenes()
    found = corpus(scenes)
    over = found.overlap([1], [2])
    assert 0.2 < (over > 0).mean() < 1 and over.max() <= 1
    assert np.allclose(over, found.overlap([2], [1]))
    assert np.allclose(over, corpus([s[:, ::-1] for s in scenes]).overlap([1], [2]))
    assert np.allclose(over, corpus([np.roll(s, (2, 3), (0, 1)) for s in scenes]).overlap([1], [2]))
    half = corpus([scene([(1, 4, 2, 4, 4), (2, 4, 4, 4, 8)])[0]])
    assert half.overlap([1], [2])[0] == pytest.approx(0.5)


def test_latents_of_one_name_make_common_areas():
    z, _ = scene([(1, 2, 2, 4, 4), (2, 2, 2, 4, 4), (1, 10, 10, 3, 3)])
    z[..., 2] *= 20
    found = corpus([z])
    assert found.count([1]) == 2 and found.count([2]) == 1 and found.count([1, 2]) == 2


def test_many_items_are_labelled_in_parts(monkeypatch):
    scenes = random_scenes(23)
    whole = corpus(scenes)
    over, left = whole.overlap([1], [2]), whole.signed_left([1], [2])
    monkeypatch.setattr("mmsae.interpret.areas.relations.CELLS", 5 * 32 * 32)
    parts = corpus(scenes)
    assert np.allclose(over, parts.overlap([1], [2])) and np.allclose(left, parts.signed_left([1], [2]))


def test_queries_over_evidence(tmp_path):
    scenes = [
        scene([(1, 1, 1, 3, 3), (1, 9, 9, 3, 3)])[0], scene([(1, 2, 2, 4, 4), (2, 2, 10, 4, 4)])[0],
        scene([(2, 2, 2, 4, 4), (1, 2, 10, 4, 4)])[0], scene([(1, 2, 2, 5, 5), (2, 3, 3, 3, 3)])[0],
    ]  # fmt: skip
    folder = write_evidence(tmp_path / "e", {"image": np.stack(scenes).reshape(4, 256, D)}, grid={"image": (16, 16)})
    evidence = Evidence(folder)
    areas = CorpusAreas.of_evidence(evidence)
    codes = {"image": evidence.lists("image")}
    said = {
        "count(#1) >= 2": [1, 0, 0, 0],
        "count(dog) == 1 & left_of(dog, #2)": [0, 1, 0, 0],
        "left_of(#2, #1)": [0, 0, 1, 0],
        "overlap(#1, #2) > .1": [0, 0, 0, 1],
    }
    for text, expected in said.items():
        assert evaluate(text, codes, names={1: "dog"}, areas=areas, holds=True).tolist() == [bool(e) for e in expected]


def test_evidence_without_a_grid_is_refused(tmp_path):
    folder = write_evidence(tmp_path / "e", {"image": np.ones((6, 1, 4), np.float32)})
    with pytest.raises(InputError, match="patch grid"):
        CorpusAreas.of_evidence(Evidence(folder))

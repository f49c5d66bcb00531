"""What a folder of evidence gives back is what went into it."""

import numpy as np
import pytest

from mmsae.errors import InputError
from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.evidence import write_evidence


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rng = np.random.default_rng(0)
    z = {m: rng.random((40, 6, 5)).astype(np.float32) * (rng.random((40, 6, 5)) < 0.2) for m in ("image", "text")}
    z["image"][:, :, 4] = 0
    images = rng.integers(0, 255, (40, 16, 24, 3)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("made") / "evidence"
    write_evidence(folder, z, captions=[f"a {i}" for i in range(40)], images=images, grid={"image": (2, 3)})
    return Evidence(folder), z


@pytest.mark.parametrize("modality", ["image", "text"])
def test_codes_and_lists_are_the_pooled_codes(made, modality):
    evidence, z = made
    assert np.array_equal(evidence.codes(modality).matrix().toarray(), z[modality].max(1))
    assert np.array_equal(evidence.lists(modality).matrix().toarray(), z[modality].max(1).T)


def test_a_heat_map_is_the_codes_of_an_items_places(made):
    evidence, z = made
    item = int(evidence.top("image").item[2, 0])
    assert np.array_equal(evidence.heat(item, 2), z["image"][item, :, 2].reshape(2, 3))
    assert evidence.heat(item, 2, "text") is None


def test_examples_fire_or_are_silent_and_halves_are_disjoint(made):
    evidence, z = made
    pooled = z["image"].max(1)
    for half in ("train", "test"):
        assert (pooled[evidence.positives(1, "image", half), 1] > 0).all()
        assert (pooled[evidence.negatives(1, "image", half), 1] == 0).all()
    assert not set(evidence.positives(1, "image", "train")) & set(evidence.positives(1, "image", "test"))


def test_a_latent_that_never_fires_has_no_top_items(made):
    assert (made[0].top("image").item[4] == -1).all()
    assert made[0].stats("image").mean_active[4] == 0


def test_evidence_of_another_sae_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="evidence of sae ssssssssssss, not of tttttttttttt"):
        Evidence(made[0].folder, sae="t" * 32)
    with pytest.raises(InputError, match="no folder of evidence"):
        Evidence(tmp_path)


def test_thumbnails_are_images_of_their_items(made):
    evidence, _ = made
    item = int(evidence.top("image").item[0, 0])
    assert evidence.thumbnail(item)[8:12] == b"WEBP"
    assert evidence.thumbnail(10**6) is None

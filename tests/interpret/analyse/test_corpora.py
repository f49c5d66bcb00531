"""Which items an analysis is of: folders, splits, near-duplicates, and what counts as present."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.interpret.analyse.corpora import (
    counts,
    latent_names,
    presence,
    read_uids,
    two_corpora,
    which_modality,
    whole,
)
from mmsae.interpret.analyse.options import Analysing, Splitting
from mmsae.interpret.evidence.folder import Evidence
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.metrics.concepts.query import write_query
from mmsae.types import InputError
from tests.helpers.evidence import write_evidence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    z = np.zeros((12, 1, 4))
    z[:6, 0, 0], z[::2, 0, 1], z[3:9, 0, 2] = 1, 2, 3
    labels = ["cat"] * 4 + ["dog"] * 4 + ["cow"] * 3 + [""]
    return write_evidence(tmp_path_factory.mktemp("c") / "e", {"image": z}, labels=labels,
                          copies=[-1, 0, -1, -1, -1, -1, -1, -1, -1, 8, 2, -1])  # fmt: skip


def split(folder, **given):
    a, b = two_corpora([Evidence(folder)], Splitting(**given), {0: "zero"})
    return a.rows.tolist(), b.rows.tolist(), a.name, b.name


def test_one_folder_is_split(folder, tmp_path):
    assert split(folder, split="zero & ~#1") == (
        [1, 3, 5],
        [0, 2, 4, *range(6, 12)],
        '"zero" & ~#1',
        'not ("zero" & ~#1)',
    )
    path = write_query(tmp_path / "query.json", "#2", "s" * 32)
    assert split(folder, split=str(path))[0] == list(range(3, 9))
    assert split(folder, labels_a=("cat",)) == ([0, 1, 2, 3], list(range(4, 12)), "cat", "not cat")
    assert split(folder, labels_a=("cat",), labels_b=("dog", "cow"))[1] == list(range(4, 11))
    (tmp_path / "mine.txt").write_text(f"{3:032x}\n{5:032x}\n\n")
    assert split(folder, uids=str(tmp_path / "mine.txt"))[::2] == ([3, 5], "mine")
    np.save(tmp_path / "uids.npy", np.array([(0, 3), (0, 5)], dtype="u8,u8"))
    assert read_uids(str(tmp_path / "uids.npy")) == {f"{3:032x}", f"{5:032x}"}


def test_near_duplicates_count_once(folder):
    assert whole(Evidence(folder)).without_copies().rows.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 11]
    a, b = two_corpora([Evidence(folder)], Splitting(labels_a=("cow",)), {})
    assert a.without_copies().rows.tolist() == [8, 10] and b.without_copies().rows.tolist() == [0, *range(2, 8), 11]


def test_two_folders(folder, tmp_path):
    z = np.ones((3, 1, 4))
    other = write_evidence(tmp_path / "dogs" / "evidence", {"image": z})
    another = write_evidence(tmp_path / "cats" / "evidence", {"image": z}, host="i" * 32)
    a, b = two_corpora([Evidence(folder), Evidence(other)], Splitting(), {})
    assert (a.n, b.n, b.name) == (12, 3, "evidence")
    with pytest.raises(InputError, match=r"of host hhhhhhhhhhhh and .* of host iiiiiiiiiiii"):
        two_corpora([Evidence(other), Evidence(another)], Splitting(), {})
    with pytest.raises(InputError, match="labels_a splits one"):
        two_corpora([Evidence(folder), Evidence(other)], Splitting(labels_a=("cat",)), {})
    with pytest.raises(InputError, match="two folders of evidence, and 3"):
        two_corpora([Evidence(folder)] * 3, Splitting(), {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "is one corpus, and diff compares two"),
        ({"split": "#1", "labels_a": ("cat",)}, "not 2 of them"),
        ({"labels_a": ("bird",)}, "no item of .* has the label 'bird'; there are cat, cow, dog"),
        ({"labels_a": ("cat",), "labels_b": ("cat", "dog")}, r"\['cat'\] are on both sides"),
        ({"split": "#3"}, "#3 is without items"),
        ({"split": ""}, "is one corpus"),
        ({"uids": "nowhere.txt"}, "cannot be read"),
        ({"uids": "nowhere.npy"}, "no list of uids"),
    ],
)
def test_what_cannot_be_split(folder, given, says):
    with pytest.raises(InputError, match=says):
        split(folder, **given)


def test_presence_by_percentile():
    z = csr_matrix(np.array([[1.0, 0, -4], [2, 5, 0], [2, 5, 0], [3, 0, 0]]))
    assert presence([z])[0].toarray().tolist() == [[1, 0, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    # percentiles of latent 0: 1/4, 3/4, 3/4, 1; of 1: 1, 1; of 2: 1
    assert presence([z], 0.5)[0].toarray().tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert presence([z], 0.75)[0].toarray().tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 0]]
    a, b = presence([z[:1], z[1:]], 0.5)  # percentiles over both
    assert a.toarray().tolist() == [[0, 0, 1]] and counts(b).tolist() == [3, 2, 0]


def test_presence_is_that_of_a_naive_loop():
    rng = np.random.default_rng(0)
    z = rng.integers(-3, 4, (60, 9)) * (rng.random((60, 9)) < 0.5)
    fast = presence([csr_matrix(z.astype(np.float32))], 0.6)[0].toarray()
    for j in range(9):
        size = np.abs(z[:, j])
        on = size[size > 0]
        assert fast[:, j].tolist() == [int(s > 0 and (on <= s).mean() > 0.6) for s in size]


def test_names_and_modalities(folder, tmp_path):
    e = Evidence(folder)
    assert latent_names(e, None) == {}
    own = write_names(tmp_path / "n.json", {1: LatentName("red"), 2: LatentName(None)}, "s" * 32)
    assert latent_names(e, str(own)) == {1: "red"}
    other = write_names(tmp_path / "o.json", {1: LatentName("red")}, "t" * 32)
    with pytest.raises(InputError, match="names latents of SAE tttttttttttt"):
        latent_names(e, str(other))
    assert which_modality(e, "") == "image"
    with pytest.raises(InputError, match=r"modality is 'text', and .* has codes of image"):
        which_modality(e, "text")
    with pytest.raises(InputError, match=r"above is 1.0"):
        Analysing(above=1.0)

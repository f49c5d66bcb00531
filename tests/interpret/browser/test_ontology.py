import numpy as np
import pytest

from mmsae.interpret.browser.ontology import write_ontology
from mmsae.interpret.evidence.folder import Evidence
from mmsae.types import InputError
from tests.helpers.browser import read
from tests.helpers.evidence import write_evidence

TREE = {"cat": "animal", "dog": "animal", "car": "vehicle", "bus": "vehicle", "animal": "thing", "vehicle": "thing"}


@pytest.fixture
def evidence(tmp_path):
    """Latent 0 fires on cats, 1 on cats and dogs, 2 on cars and buses, 3 on everything, 4 never."""
    labels = ["cat", "dog", "car", "bus"] * 10
    on = {0: {"cat"}, 1: {"cat", "dog"}, 2: {"car", "bus"}, 3: set(labels)}
    z = np.array([[[float(x in on.get(j, ())) for j in range(5)]] for x in labels])
    write_evidence(tmp_path / "e", {"image": z}, labels=labels)
    (tmp_path / "tree.tsv").write_text("".join(f"{k}\t{v}\n" for k, v in TREE.items()))
    return Evidence(tmp_path / "e"), tmp_path


def test_latents_sit_at_the_lowest_node_above_their_classes(evidence):
    e, folder = evidence
    write_ontology(folder / "data", e, str(folder / "tree.tsv"))
    page = read(folder, "tree")
    at = {n["name"]: n["latents"] for n in page["nodes"] if n["latents"]}
    assert at == {"cat": [[0, 1.0]], "animal": [[1, 1.0]], "vehicle": [[2, 1.0]]}
    assert page["sizes"] == {"none": 2, "one": 1, "more": 2} and page["living"] == 4 and page["classes"] == 4
    assert page["measures"]["height"]["value"] == 1 and page["measures"]["purity"]["value"] == 1


def test_blocks_of_latents_change_nothing(evidence, monkeypatch):
    e, folder = evidence
    whole = write_ontology(folder / "data", e, str(folder / "tree.tsv"))
    monkeypatch.setattr("mmsae.interpret.browser.ontology.CELLS", 80)
    assert write_ontology(folder / "data", e, str(folder / "tree.tsv")) == whole


def test_labels_that_the_tree_lacks(evidence):
    e, folder = evidence
    (folder / "small.tsv").write_text("cat\tanimal\ndog\tanimal\n")
    with pytest.raises(InputError, match="the tree lacks 2 of 4 classes"):
        write_ontology(folder / "data", e, str(folder / "small.tsv"))

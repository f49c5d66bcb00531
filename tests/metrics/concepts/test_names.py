"""Names of latents as a file: written, read, refused; the older form stays readable."""

import json
import math

import pytest

from mmsae.metrics.concepts.names import FORMAT, METHODS, LatentName, names_beside, names_only, read_names, write_names
from mmsae.types import InputError

RED = LatentName("red circle", "wpmi", 1.5, 0.25, 4.0, 0.9, "ViT-B-32/openai")
NONE = LatentName(None, "captions", 0.2, 0.0, 1.0, math.nan, "captions", "AUROC of 0.6 is below 0.75")


def test_what_is_written_is_read_and_unnamed_latents_keep_their_figures(tmp_path):
    path = write_names(tmp_path / "names.json", {12: RED, 3: NONE}, "a" * 32)
    said = json.loads(path.read_text())
    assert said["format"] == FORMAT and said["sae"] == "a" * 32 and list(said["names"]) == ["3", "12"]
    assert said["names"]["3"]["name"] is None and said["names"]["3"]["auroc"] is None  # NaN is no JSON
    found = read_names(path, "a" * 32)
    assert found[12] == RED and math.isnan(found[3].auroc) and found[3]._replace(auroc=0.0) == NONE._replace(auroc=0.0)
    assert names_only(found) == {12: "red circle"}
    assert read_names(path) == {**found, 3: found[3]}
    with pytest.raises(InputError, match="names latents of SAE aaaaaaaaaaaa, not of bbbbbbbbbbbb"):
        read_names(path, "b" * 32)


def test_a_name_says_where_it_comes_from():
    assert RED.provenance() == "wpmi, AUROC 0.90, z 4.0, by ViT-B-32/openai"
    assert NONE.provenance() == "captions, z 1.0" and LatentName("cat").provenance() == "person"


def test_names_lie_in_the_evidence_beside_an_sae(tmp_path):
    assert names_beside(tmp_path / "sae") is None
    path = write_names(tmp_path / "evidence" / "names" / "names.json", {12: RED}, "a" * 32)
    assert names_beside(tmp_path / "sae") == path


def test_the_older_form_is_read_and_fits_any_sae(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"12": "red circle", "7": ""}))
    found = read_names(path, "b" * 32)
    assert found[12].name == "red circle" and found[12].method == "person" and math.isnan(found[12].auroc)
    assert names_only(found) == {12: "red circle"} and found[7].name is None
    assert read_names(None) == {} and "person" in METHODS


def test_names_that_a_person_wrote_by_hand_may_leave_figures_out(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"format": 1, "names": {"4": {"name": "cat", "method": "person"}}}))
    assert read_names(path, "b" * 32)[4].name == "cat"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "is not a JSON object of latent: name, but a list"),
        ("nonsense", "is not a JSON object of latent: name"),
        ('{"red": "circle"}', "for latent 'red' it has 'circle'"),
        ('{"3": 4}', "for latent '3' it has 4"),
        ('{"format": 1, "sae": "", "names": {"3": {"name": "x", "auroc": "high"}}}', "for latent '3'"),
        ('{"format": 9, "sae": "", "names": {}}', "format 9; this version reads up to 1"),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as said:
        read_names(path)
    assert "\n" not in str(said.value) and "names.json" in str(said.value)

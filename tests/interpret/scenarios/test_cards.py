import json

import numpy as np
import pytest

from mmsae.errors import InputError
from mmsae.interpret.areas.relations import CorpusAreas
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scenarios.cards import Cards, FieldGroup, read_groups, verdicts
from mmsae.world.generator.scene import BACKGROUNDS, COLOURS, CONCEPTS, SHAPES
from tests.helpers.areas import D, scene
from tests.helpers.evidence import write_evidence
from tests.helpers.scenarios import oracle_world

NAMES = dict(enumerate(CONCEPTS))
GROUPS = {
    "environment": FieldGroup(True, {v: [v] for v in BACKGROUNDS}),
    "layout": FieldGroup(False, {v: [v] for v in ("left of", "above", "two objects")}),
    "actors": FieldGroup(False, {v: [v] for v in (*SHAPES, *COLOURS)}),
}


def test_fields_are_the_truth_and_captions_agree(tmp_path):
    data, _ = oracle_world(tmp_path / "e", 300)
    maker = Cards(Evidence(tmp_path / "e"), NAMES, GROUPS, present=0)
    cards = [maker.card(i) for i in range(300)]
    for i, card in enumerate(cards):
        for group in ("environment", "actors"):
            true = {v for v in GROUPS[group].values if data.concepts[i, CONCEPTS.index(v)]}
            seen = {f["value"] for f in card["fields"][group] if any(e["source"] == "image" for e in f["evidence"])}
            assert seen == true and set(card["validation"][group].values()) == {"agree"}
        assert not card["conflict"]
    counts = verdicts(cards)
    assert counts["environment"] == {"agree": 300, "image_only": 0, "text_only": 0, "conflict": 0}
    json.dumps(cards)


def test_a_swapped_caption_is_a_conflict_where_it_says_another_environment(tmp_path):
    swapped = list(range(1, 300, 2))
    data, captions = oracle_world(tmp_path / "e", 300, 0, swapped)
    maker = Cards(Evidence(tmp_path / "e"), NAMES, GROUPS, present=0)
    for i in range(300):
        own = BACKGROUNDS[data.scenes.background[i]]
        told = next(b for b in BACKGROUNDS if f"on a {b} background" in captions[i])
        assert maker.card(i)["conflict"] == (own != told)
    data, captions = oracle_world(tmp_path / "f", 300, 0, range(2, 300, 2))  # the pair before is another scene
    maker = Cards(Evidence(tmp_path / "f"), NAMES, GROUPS, present=0)
    flagged = [maker.card(i)["conflict"] for i in range(300)]
    assert 0.4 < np.mean(flagged[2::2]) < 0.9 and not any(flagged[1::2])


def test_one_sided_fields_are_no_conflict(tmp_path):
    z = np.zeros((40, 1, 4), np.float32)
    z[::2, 0, 0] = 1
    captions = ["a photo of a dog at night"] * 40
    Evidence(write_evidence(tmp_path / "e", {"image": z}, captions=captions))
    groups = read_groups()
    card = Cards(Evidence(tmp_path / "e"), {0: "horse"}, groups, 0).card(0)
    assert card["validation"]["animals"] == {"dog": "text_only", "horse": "image_only"}
    assert card["validation"]["light"] == {"night": "text_only"} and not card["conflict"]


def test_counts_and_boxes_come_from_areas(tmp_path):
    scenes = np.stack([scene([(1, 1, 1, 3, 3), (1, 9, 9, 4, 4)])[0], scene([(2, 2, 2, 4, 4)])[0]] * 3)
    folder = write_evidence(tmp_path / "e", {"image": scenes.reshape(6, 256, D)}, grid={"image": (16, 16)})
    evidence = Evidence(folder)
    groups = {"animals": FieldGroup(False, {"dog": ["dog"]})}
    card = Cards(evidence, {1: "a dog"}, groups, 0, CorpusAreas.of_evidence(evidence)).card(0, query="dog")
    (found,) = card["fields"]["animals"]
    assert found["evidence"][0]["count"] == 2 and card["query"] == "dog"
    assert found["evidence"][0]["boxes"][0] == [0.0625, 0.0625, 0.25, 0.25]


def test_the_default_groups_and_bad_files(tmp_path):
    assert list(read_groups()) == ["light", "weather", "place", "people", "vehicles", "animals", "action"]
    assert read_groups()["light"].one
    for text, said in (("[1]", "has no groups"), ("a: {values: {b: c}}", "group 'a' needs values"), ("{", "no YAML")):
        (tmp_path / "g.yaml").write_text(text)
        with pytest.raises(InputError, match=said):
            read_groups(tmp_path / "g.yaml")

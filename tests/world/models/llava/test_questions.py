"""Questions about scenes, and the dialogues made of them."""

import json

import numpy as np
import pytest

from mmsae.shards import ShardWriter
from mmsae.types import InputError
from mmsae.world.generator.data import generate
from mmsae.world.generator.shards import write_world
from mmsae.world.models.llava.model import build_tokenizer
from mmsae.world.models.llava.questions import (
    OBJECTS,
    Lessons,
    near_misses,
    object_questions,
    present_objects,
    shard_lessons,
    world_lessons,
)
from mmsae.world.models.llava.train import Dialogues, LlavaTraining


@pytest.fixture(scope="module")
def data():
    return generate(60, 5)


def test_present_objects_are_those_of_the_captions(data):
    present = present_objects(data.scenes)
    for row, caption in zip(present, data.full, strict=True):
        plain = caption.replace("striped ", "").replace("solid ", "")
        assert {OBJECTS[i] for i in np.flatnonzero(row)} == {o for o in OBJECTS if o in plain}


def test_near_misses_share_colour_or_shape():
    present = np.zeros((1, 30), bool)
    present[0, [OBJECTS.index("red circle"), OBJECTS.index("blue ring")]] = True
    near = {OBJECTS[i] for i in np.flatnonzero(near_misses(present)[0])}
    assert "red ring" in near and "blue circle" in near and "green circle" in near and "red cross" in near
    assert "green cross" not in near and "red circle" not in near and len(near) == 10 + 12 - 4 - 2


@pytest.mark.parametrize("kind", ["random", "adversarial", "popular"])
def test_questions_are_balanced_and_true(data, kind):
    present = present_objects(data.scenes)
    q = object_questions(data.scenes, 3, kind, per_image=2)
    assert len(q.texts) == 4 * data.scenes.n and q.answers.mean() == 0.5
    assert np.array_equal(present[q.row, q.objects], q.answers)
    assert q.texts[0] == f"is there a {OBJECTS[q.objects[0]]}?"
    no = ~q.answers
    if kind == "adversarial":
        assert near_misses(present)[q.row[no], q.objects[no]].all()
    if kind == "popular":
        share = present.mean(0)
        for row, thing in zip(q.row[no], q.objects[no], strict=True):
            assert share[thing] == share[~present[row]].max()
    again = object_questions(present, 3, kind, per_image=2)
    assert again.texts == q.texts and object_questions(present, 4, kind).texts != q.texts[: len(again.texts) // 2]


def test_dialogues_tell_the_truth_and_are_predicted_at_answers_alone(data):
    lessons = world_lessons(data)
    tokenizer = build_tokenizer(lessons.texts())
    made = Dialogues(lessons, tokenizer, 4, LlavaTraining(10, batch_size=40, p_caption=0.3))
    rows, ids, weights = made(9)
    again = made(9)
    assert all(np.array_equal(a, b) for a, b in zip((rows, ids, weights), again, strict=True))
    present, kinds = lessons.present, set()
    for row, i, w in zip(rows, ids, weights, strict=True):
        text = tokenizer.decode(i, skip_special_tokens=False).replace("<pad>", "").split()
        text = " ".join(text)
        assert text.startswith("<s> user : <image> <image> <image> <image> ")
        said = tokenizer.decode(i[w > 0]).split("</s>")[:-1]
        turns = text.split("user : ")[1:]
        assert len(said) == len(turns)
        for turn, answer in zip(turns, said, strict=True):
            question = turn.replace("<image> ", "").split(" assistant")[0]
            kinds.add(question.split()[0])
            if question.startswith("describe"):
                assert answer.strip() == data.full[row]
                continue
            thing = question.removeprefix("is there a ").removesuffix(" ?")
            there = {OBJECTS[k] for k in np.flatnonzero(present[row])}
            ok = any(thing in (o, o.split()[1]) or thing == f"{o.split()[0]} shape" for o in there)
            assert answer.strip() == ("yes" if ok else "no")
    assert kinds == {"is", "describe"}


def test_lessons_from_shards(data, tmp_path):
    write_world(tmp_path / "w", 60, 5, progress=False)
    got, want = shard_lessons(str(tmp_path / "w")), world_lessons(data)
    assert np.array_equal(got.images, want.images) and np.array_equal(got.present, want.present)
    assert got.captions == want.captions
    with ShardWriter(tmp_path / "qa", "q") as w:
        raw = (tmp_path / "w").glob("*.tar")
        import tarfile

        png = tarfile.open(next(raw)).extractfile("world-0000000.png").read()
        w.write("a", {"png": png, "txt": "a thing", "json": {"question": "is there a ring?", "answer": "no"}})
        w.write("b", {"png": png, "txt": "a thing", "json": {"other": json.dumps(1)}})
    own = shard_lessons(str(tmp_path / "qa"))
    assert own.dialogues == [("is there a ring?", "no"), None] and own.captions == [[], ["a thing"]]
    tokenizer = build_tokenizer(own.texts())
    rows, ids, weights = Dialogues(own, tokenizer, 1, LlavaTraining(1, batch_size=20))(0)
    said = {int(r): tokenizer.decode(i[w > 0]) for r, i, w in zip(rows, ids, weights, strict=True)}
    assert said == {0: "no </s>", 1: "a thing </s>"}
    with pytest.raises(InputError):
        shard_lessons(str(tmp_path / "none"))
    assert isinstance(own, Lessons)

import json
from collections import Counter
from pathlib import Path

import pytest

from mmsae.lvlm.hallucination.questions import ask, build_pope, load_questions, names_of, read_objects, save_questions
from mmsae.types import InputError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (SHARED / "pope").is_dir(), reason="the shared POPE files are not here")
PICTURES = {f"p{i}": ["dog", "cat", "car"] for i in range(8)} | {
    "q0": ["dog", "bird", "tree"], "q1": ["bird", "tree", "apple"], "q2": ["dog", "cat", "apple", "owl"], "few": ["dog"]
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_questions_are_true_and_balanced(strategy):
    questions = build_pope(PICTURES, strategy, per_image=3)
    assert [q.question_id for q in questions] == list(range(1, len(questions) + 1))
    by_image = {}
    for q in questions:
        assert (q.object in PICTURES[q.image]) == (q.label == "yes") and q.object in q.text
        by_image.setdefault(q.image, []).append(q)
    assert len(by_image) == 11 and "few" not in by_image
    for own in by_image.values():
        assert Counter(q.label for q in own) == {"yes": 3, "no": 3} and len({q.object for q in own}) == 6
    assert build_pope(PICTURES, strategy) == questions != build_pope(PICTURES, strategy, seed=1)


def test_strategies():
    def absent(strategy, image):
        own = [q for q in build_pope(PICTURES, strategy, per_image=1) if q.image == image]
        return own[1].object

    assert absent("popular", "q1") == "dog" and absent("popular", "q0") == "cat" and absent("popular", "p0") == "apple"
    asked = [q for q in build_pope(PICTURES, "adversarial", per_image=1) if q.image == "q0"]
    near = {"dog": "cat", "bird": "apple", "tree": "apple"}
    assert asked[1].object == near[asked[0].object]
    same = [[q.object for q in build_pope(PICTURES, s) if q.label == "yes"] for s in ("random", "popular")]
    assert same[0] == same[1]


def test_articles_names_and_files(tmp_path):
    assert (
        ask("apple") == "Is there an apple in the image?"
        and ask("car", "is there {a} {object} ?") == "is there a car ?"
    )
    assert names_of({"dog": 2, "cat": 1}) == ["dog", "cat"] and names_of([{"category": "dog"}]) == ["dog"]
    assert names_of([{"colour": "red", "shape": "circle"}], ("colour", "shape")) == ["red circle"]
    with pytest.raises(InputError, match="an object has the fields colour: say which"):
        names_of([{"colour": "red"}])
    questions = build_pope(PICTURES)
    assert load_questions(save_questions(questions, tmp_path / "q.json")) == questions
    (tmp_path / "bad.json").write_text('{"question_id": 1}\n')
    with pytest.raises(InputError, match="line 1 of"):
        load_questions(tmp_path / "bad.json")
    with pytest.raises(InputError, match="strategy 'hard'"):
        build_pope(PICTURES, "hard")
    few = build_pope({"a": ["cat", "dog", "cow"], "b": ["cat", "pig", "hen"]})  # two are absent from each picture
    assert Counter(q.label for q in few) == {"yes": 4, "no": 4}
    with pytest.raises(InputError, match="none of 12 images has at least 9 objects"):
        build_pope(PICTURES, min_objects=9)
    line = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "Yes"}
    (tmp_path / "q.json").write_text(json.dumps(line))
    assert load_questions(tmp_path / "q.json")[0].label == "yes"
    (tmp_path / "q.json").write_text(json.dumps(line | {"label": "maybe"}))
    with pytest.raises(InputError, match=r"line 1 of .* has the label 'maybe'"):
        load_questions(tmp_path / "q.json")


@needs_data
def test_published_questions():
    for strategy in ("random", "popular", "adversarial"):
        questions = load_questions(SHARED / "pope" / f"coco_pope_{strategy}.json")
        assert len(questions) == 3000 and Counter(q.label for q in questions) == {"yes": 1500, "no": 1500}
        names = [n for n in json.loads((SHARED / "chair" / "coco_categories.json").read_text())]
        texts = {ask(n) for n in names}
        assert sum(q.text in texts for q in questions) > 2900  # the original writes "a skis" and some articles wrongly


@needs_data
def test_questions_of_labelled_shards():
    objects = read_objects(str(SHARED / "coco_mini"))
    assert len(objects) == 80
    published = load_questions(SHARED / "pope" / "coco_mini_train_pope_random.json")
    questions = build_pope(objects, "popular", min_objects=1)
    assert Counter(q.label for q in questions) == {"yes": 195, "no": 195} and len(published) == 390
    common = Counter(o for own in objects.values() for o in set(own))
    no = Counter(q.object for q in questions if q.label == "no")
    assert no.most_common(1)[0][0] in [o for o, _ in common.most_common(4)]

"""Goals are asked of an SAE wherever it was run."""

from mmsae.bench.multimodal.goals import GOALS, reached


def test_goals_are_asked_where_the_sae_was_run():
    tables = {
        "uncentred, F 128, k 8": {"a": {"recall": 0.95}, "b": {"recall": 0.1}},
        "noisy host, F 128, k 8": {"a": {"wrong_weighted": 0.93, "wrong_host": 0.94}},
        "photographs, F 48, k 4": {"a": {"zero_shot": 0.7, "zero_shot_host": 0.8}},
        "elsewhere": {"a": {"recall": 1.0}},
    }
    head, rows = reached(tables, ["a", "b"])
    assert head == ["where", "figure", "goal", "a", "b"]
    assert [(row[0].split(",")[0], *row[2:]) for row in rows] == [
        ("uncentred", "≥ 0.94", "0.950", "0.100: no"),
        ("noisy host", "≥ 0.925", "0.930", ""),
        ("noisy host", "≥ 0", "-0.010: no", ""),
        ("photographs", "≥ 0.95", "0.875: no", ""),
    ]
    assert reached({}, ["a"])[1] == []


def test_a_bound_is_on_the_side_that_its_sign_says():
    goals = {(place, goal.text): goal for place, some in GOALS.items() for goal in some}
    dead = goals["world, F 128, k 8", "dead"]
    assert dead.at_most and not goals["world, F 48, k 6", "R@1"].at_most
    at = {goal.text: goal.bound for goal in GOALS["world, F 48, k 6"]}
    assert at == {"F1 same": 0.79, "AUC same": 0.88, "R@1": 0.91}
    place = {"a": {"fvu_image": 0.05}}
    (row,) = [r for r in reached({"world, F 128, k 8": place}, [])[1] if r[1] == "FVU image"]
    assert row == ["world, F 128, k 8", "FVU image", "≤ 0.045"]

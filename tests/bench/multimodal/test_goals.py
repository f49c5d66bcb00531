"""Goals are asked of one SAE, wherever it was run."""

from mmsae.bench.multimodal.goals import GOALS, reached


def test_goals_are_asked_where_the_sae_was_run():
    tables = {
        "uncentred, F 128, k 8": {"a": {"recall": 0.95}, "b": {"recall": 0.1}},
        "noisy host, F 128, k 8": {"a": {"wrong_weighted": 0.93, "wrong_host": 0.94}},
        "photographs, F 48, k 4": {"a": {"zero_shot": 0.7, "zero_shot_host": 0.8}},
        "elsewhere": {"a": {"recall": 1.0}},
    }
    found = reached(tables, "a")
    assert [(place.split(",")[0], value, said) for place, _, _, value, said in found] == [
        ("uncentred", "0.950", "yes"),
        ("noisy host", "0.930", "yes"),
        ("noisy host", "-0.010", "no"),
        ("photographs", "0.875", "no"),
    ]
    assert [row[-1] for row in reached(tables, "b")] == ["no"] and reached(tables, None) == reached({}, "a") == []


def test_a_bound_is_on_the_side_that_its_sign_says():
    goals = {(place, goal.text): goal for place, some in GOALS.items() for goal in some}
    dead = goals["world, F 128, k 8", "dead"]
    assert dead.at_most and not goals["world, F 48, k 6", "R@1"].at_most
    at = {goal.text: goal.bound for goal in GOALS["world, F 48, k 6"]}
    assert at == {"F1 same": 0.79, "AUC same": 0.88, "R@1": 0.91}

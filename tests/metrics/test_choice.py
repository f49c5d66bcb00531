"""Settings at the end of their grid are said."""

import pytest

from mmsae.metrics.choice import at_edge, edge_warning, warn_at_edge


def test_ends_of_a_grid_are_said_and_the_middle_is_not():
    assert at_edge("knn", 10, (50, 10, 20)) == ["knn 10 (of 10 to 50)"]
    assert at_edge("knn", 50, (50, 10, 20)) == ["knn 50 (of 10 to 50)"]
    assert at_edge("knn", 20, (50, 10, 20)) == []


def test_what_was_not_chosen_or_has_nothing_beyond_is_not_said():
    assert at_edge("knn", 5, (5, 5)) == []
    assert at_edge("alpha", 0.0, (0.0, 0.5), natural=(0.0,)) == []


def test_one_warning_holds_all():
    assert edge_warning([]) == []
    (said,) = edge_warning(["a 1 (of 1 to 2)", "b 3 (of 0 to 3)"])
    assert said.endswith("a 1 (of 1 to 2); b 3 (of 0 to 3)")


def test_a_library_call_warns():
    tried = [{"k": k, "g": 1.0} for k in (1, 2, 3)]
    with pytest.warns(UserWarning, match=r"k 3 \(of 1 to 3\)$"):
        warn_at_edge(tried, tried[2], ("k", "g"))

"""Which units are done and which failed, and going on without those that fail."""

import json

import pytest

from mmsae.errors import EndsJob, InputError
from mmsae.jobs.tally import TRIED, Failure, Tally, UnitsFailed, go_on, told


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path / "parts", [f"{c}.tar" for c in "abcdef"], [f"{i}-{c}.part" for i, c in enumerate("abcdef")])


def worker(tally, broken=(), error=InputError, calls=None):
    """Writes parts one after the other; raises at units that are broken."""
    tally.folder.mkdir(exist_ok=True)

    def work(units):
        if calls is not None:
            calls.append(list(units))
        for u in units:
            if u in broken:
                raise error(f"unit {u} is broken")
            (tally.folder / tally.files[u]).touch()
            tally.clear(u)

    return work


def test_what_is_noted_is_read_again(tally):
    tally.note()
    tally.note()
    assert Tally.read(tally.folder / "units.json") == tally and tally.missing() == [0, 1, 2, 3, 4, 5]
    worker(tally)([1, 4])
    assert tally.missing() == [0, 2, 3, 5] and tally.failed() == {}


def test_others_go_on_and_those_that_fail_are_named(tally):
    calls = []
    with pytest.raises(UnitsFailed) as e:
        go_on(worker(tally, {1, 4}, calls=calls), range(6), tally)
    assert str(e.value) == (
        "2 of 6 shards failed, the others are done; the same command tries them again: "
        "b.tar: unit 1 is broken; e.tar: unit 4 is broken"
    )
    assert calls == [[0, 1, 2, 3, 4, 5], [1], [2, 3, 4, 5], [4], [5]] and tally.missing() == [1, 4]
    assert tally.failed() == {1: Failure("b.tar", "unit 1 is broken"), 4: Failure("e.tar", "unit 4 is broken")}
    assert json.loads((tally.folder / "1-b.part.failed").read_text())["error"] == "unit 1 is broken"
    go_on(worker(tally), tally.missing(), tally)
    assert tally.missing() == [] and tally.failed() == {} and not list(tally.folder.glob("*.failed"))


def test_an_error_that_another_unit_causes_is_not_the_first_ones(tally):
    """Tars are decoded side by side: the stream may break at one before the one that is worked on is done."""
    plain = worker(tally, {3}, RuntimeError)

    def work(units):
        if 3 in units and len(units) > 1:
            raise RuntimeError("the stream broke")
        plain(units)

    with pytest.raises(UnitsFailed, match=r"1 of 6 shards failed.*d\.tar: RuntimeError: unit 3 is broken$"):
        go_on(work, range(6), tally)
    assert tally.missing() == [3]


def test_a_shard_is_named_once():
    assert (
        told([Failure("a.tar", "a.tar: it is cut"), Failure("b.tar", "no caption")])
        == "a.tar: it is cut; b.tar: no caption"
    )


def test_a_fault_of_code_is_shown_with_its_place(tally, capfd):
    with pytest.raises(UnitsFailed):
        go_on(worker(tally, {2}), range(6), tally)
    assert capfd.readouterr().err == ""  # of the input: the sentence is enough
    with pytest.raises(UnitsFailed, match="1 of 1 shards failed, none is done"):
        go_on(worker(tally, {2}, KeyError), [2], tally)
    assert "in work" in (told := capfd.readouterr().err) and "KeyError: 'unit 2 is broken'" in told


def test_where_none_is_done_the_fault_is_no_units(tally):
    calls = []
    with pytest.raises(UnitsFailed, match=r"a\.tar: unit 0.*c\.tar: unit 2") as e:
        go_on(worker(tally, set(range(6)), calls=calls), range(6), tally)
    assert str(e.value).startswith(
        f"{TRIED} of 6 shards failed, 0 are done, and 3 were not tried, since none was done when {TRIED} had failed"
    )
    assert max(map(max, calls)) == 5 and [c for c in calls if len(c) == 1] == [[0], [1], [2]]
    assert str(e.value.__cause__) == "unit 2 is broken"
    with pytest.raises(EndsJob, match="unit 0"):
        go_on(worker(tally, {0}, EndsJob), range(6), tally)

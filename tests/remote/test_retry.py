import pytest

from mmsae.errors import InputError
from mmsae.remote import retry
from mmsae.remote.retry import LONGEST_WAIT, TRIES, MayPass, retried


@pytest.fixture
def waits(monkeypatch):
    waits = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    return waits


def test_waits_grow_and_end(waits):
    def fails():
        raise MayPass("no answer")

    with pytest.raises(InputError, match=rf"place: no answer \(tried {TRIES} times\)"):
        retried("place", fails)
    assert len(waits) == TRIES - 1
    assert all(retry.FIRST_WAIT * 2**n / 2 <= w <= retry.FIRST_WAIT * 2**n for n, w in enumerate(waits))


def test_a_server_may_ask_for_more_but_not_for_ever(waits):
    asked = iter([MayPass("busy", 5), MayPass("busy", 10_000)])

    def works():
        if error := next(asked, None):
            raise error
        return "made"

    assert retried("place", works) == "made"
    assert waits[0] == 5 and waits[1] == LONGEST_WAIT


def test_other_errors_are_not_tried_again(waits):
    with pytest.raises(KeyError):
        retried("place", {}.popitem)
    assert waits == []

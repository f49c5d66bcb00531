import pytest

from mmsae.shards import FaultLog
from mmsae.types import Faults, InputError


def filled(seen, **counts):
    log = FaultLog()
    log.seen(seen)
    for kind, n in counts.items():
        for i in range(n):
            log.add(kind, "a.tar", f"{i:03d}", "why")
    return log


def test_take_drains_and_merge_adds_up():
    log, total = filled(10, broken_image=2), FaultLog()
    total.merge(log.take())
    assert log.take() == Faults()
    log.seen(5)
    log.add("missing_caption", "b.tar", "7")
    total.merge(log.take())
    assert (total.n_seen, total.dropped, total.counts) == (15, 3, {"broken_image": 2, "missing_caption": 1})
    assert ("missing_caption", "b.tar", "7", "") in total.take().examples


def test_a_flood_of_one_kind_does_not_push_out_the_examples_of_another():
    log = filled(1000, broken_image=500, empty_caption=1)
    assert log.counts["broken_image"] == 500
    kinds = [e[0] for e in log.take().examples]
    assert kinds.count("broken_image") == 20 and kinds.count("empty_caption") == 1


def test_notes_are_counted_but_not_judged():
    log = filled(2000, long_caption=2000, broken_json=5, broken_image=20)
    assert log.dropped == 20 and log.share == 0.01
    log.check(0.01, final=True)
    assert "long_caption 2000" in log.summary()


def test_limit_is_judged_after_1000_samples_and_at_the_end():
    filled(999, broken_image=999).check(0.05)
    with pytest.raises(InputError, match="999 of 999"):
        filled(999, broken_image=999).check(0.05, final=True)
    with pytest.raises(InputError, match=r"51 of 1000 samples \(5\.1%\).*limit of 5\.0%.*broken_image.*a\.tar 000"):
        filled(1000, long_caption=9, broken_image=51).check(0.05)
    filled(1000, broken_image=50).check(0.05, final=True)
    FaultLog().check(0.0, final=True)


def test_dict_round_trip_and_summary():
    log = filled(7, broken_image=1, long_caption=2)
    again = FaultLog.from_dict(log.to_dict())
    assert again.to_dict() == log.to_dict()
    lines = again.summary().splitlines()
    assert lines[0] == "7 samples seen, 1 dropped (14.29%): broken_image 1; kept, but noted: long_caption 2"
    assert lines[1].strip() == "broken_image a.tar 000 (why)" and len(lines) == 4

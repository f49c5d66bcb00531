"""Whose job a folder is: it goes on, is refused with one sentence, or appears as a whole; it has one leader."""

import json

import pytest

from mmsae.jobs import JobFolder, same_job
from mmsae.types import InputError

JOB = {"seed": 0, "how": {"k": 8, "names": ["a"]}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "its seed is 0 there and 1 here"),
        ({"how": {"k": 9, "names": ["a"]}}, r"its how\.k is 8 there and 9 here"),
        ({"more": True}, "its more is None there and True here"),
    ],
)
def test_the_field_that_differs_is_named_with_both_values(change, said):
    with pytest.raises(InputError, match=f"OUT holds the result of another job: {said}; choose another --out"):
        same_job(JOB, JOB | change, "OUT holds the result")
    same_job(JOB, JOB | change, "OUT holds the result", but=change)


def test_a_long_list_is_told_by_its_length_or_its_first_difference():
    long = [f"{i:040x}" for i in range(9)]
    with pytest.raises(InputError, match="its shards is of 9 entries there and of 8 here"):
        same_job({"shards": long}, {"shards": long[:8]}, "OUT holds the result")
    with pytest.raises(InputError, match=r"its shards\[8\] is '0.*8' there and 'x' here"):
        same_job({"shards": long}, {"shards": [*long[:8], "x"]}, "OUT holds the result")


def beside(tmp_path, job=JOB):
    return JobFolder(tmp_path / "out", job, "mmsae filter", result="results.json", beside=True)


def test_a_result_appears_as_a_whole_and_is_known_again(tmp_path):
    folder = beside(tmp_path)
    with folder.lead():
        folder.draft.mkdir()
        (folder.draft / "results.json").write_text(json.dumps({"job": folder.job}))
        (folder.draft / ".results.json.tmp-1").write_text("half")
        assert not folder.finished and beside(tmp_path).job == JOB
        folder.publish()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "results.json"]
    assert beside(tmp_path).finished
    with pytest.raises(InputError, match="holds the result of another job: its seed is 0 there and 1 here"):
        beside(tmp_path, JOB | {"seed": 1})


def test_a_job_has_one_leader_and_leaves_nothing_where_nothing_was_done(tmp_path):
    folder = beside(tmp_path)
    with folder.lead(), pytest.raises(InputError, match="another running process is working on this job"):
        with beside(tmp_path).lead():
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_stays_and_another_job_is_refused(tmp_path):
    folder = JobFolder(tmp_path / "out", JOB, "mmsae pope", writes=["answers.json"])
    with folder.lead():
        (tmp_path / "a.tar").write_bytes(b"x")
        parts = folder.parts([str(tmp_path / "a.tar")])
        parts.write(parts.units[0], b"part")
    assert parts.missing() == [] and parts.files()[0].read_bytes() == b"part"
    with pytest.raises(InputError, match="holds the unfinished work of another job: its seed"):
        JobFolder(tmp_path / "out", JOB | {"seed": 1}, "mmsae pope")


def test_other_things_are_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.json").write_text("{}")
    with pytest.raises(InputError, match=r"has answers\.json, which no mmsae pope there wrote"):
        JobFolder(tmp_path / "out", JOB, "mmsae pope", writes=["answers.json"])
    with pytest.raises(InputError, match="holds no result of mmsae weights"):
        JobFolder(tmp_path / "out", JOB, "mmsae weights", result="weights.json")

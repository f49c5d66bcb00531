"""Stages of a job by name: each once, whatever kills the job, and a folder of another job is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmsae.jobs import JobFolder, StageLog, Stages
from mmsae.types import InputError

JOB = {"seed": 0, "k": 8}


def folder(out, job=JOB, **more):
    return JobFolder(out, job, "mmsae bench", writes=(), file="recipe.json", holds="a benchmark", **more)


def never():
    pytest.fail("ran again")


def test_a_stage_runs_once_and_its_value_is_kept(tmp_path, capsys):
    stages = Stages(folder(tmp_path), progress=True)
    assert stages.run("arms/all-0", lambda: {"share": 0.25, "rows": (1, 2)}) == {"share": 0.25, "rows": [1, 2]}
    assert capsys.readouterr().out == "[arms/all-0] 0 CPU-s\n"
    again = Stages(folder(tmp_path), progress=True)
    assert again.run("arms/all-0", never) == {"share": 0.25, "rows": [1, 2]} and capsys.readouterr().out == ""
    assert set(again.read("arms/all-0")) == {"seconds", "value"} and (tmp_path / "arms/all-0.json").exists()


def test_stages_that_are_done_are_listed_those_of_earlier_runs_too(tmp_path):
    stages = Stages(folder(tmp_path), "/sae/cfg.json")
    for run in ("k8", "k16", "other"):
        stages.path(run).parent.mkdir(parents=True)
    for run in ("k8", "k16"):
        stages.path(run).write_text(json.dumps({"k": run}))
    (tmp_path / "k4").mkdir()  # begun and not done
    assert stages.all_done("k*") == ["k16", "k8"] and stages.read("k8") == {"k": "k8"}
    assert [stages.done(run) for run in ("k8", "k4", "other")] == [True, False, False]


KILLED = """
import os, signal, sys
from pathlib import Path
from mmsae.jobs import JobFolder, StageLog, Stages
out = Path(sys.argv[1])
job = JobFolder(out, {"seed": 0}, "mmsae demo", writes=(), file="demo.json", key="recipe", holds="a demo")
stages = StageLog(job) if sys.argv[2] == "log" else Stages(job)
stages.run("world", lambda: 1)
stages.run("clip", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.parametrize("kind", ["log", "files"])
def test_a_killed_job_goes_on_with_the_stage_that_it_was_in(tmp_path, capsys, kind):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), kind], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    job = JobFolder(tmp_path, {"seed": 0}, "mmsae demo", writes=(), file="demo.json", key="recipe", holds="a demo")
    stages = StageLog(job) if kind == "log" else Stages(job)
    ran = []
    stages.run("world", never)
    stages.run("clip", lambda: ran.append("clip"))
    assert ran == ["clip"] and stages.done("clip")
    written = {p.name for p in tmp_path.iterdir()}
    if kind == "files":
        assert written == {"world.json", "clip.json"}
        return
    assert capsys.readouterr().out == f"[world] done before ({stages.seconds['world']:.0f} s)\n[clip]\n"
    assert written == {"demo.json"}
    noted = json.loads(Path(tmp_path / "demo.json").read_text())
    assert noted == {"recipe": {"seed": 0}, "seconds": stages.seconds} and list(stages.seconds) == ["world", "clip"]


def test_a_stage_that_fails_is_not_done(tmp_path):
    for stages in (Stages(folder(tmp_path)), StageLog(folder(tmp_path))):
        with pytest.raises(ZeroDivisionError):
            stages.run("broken", lambda: 1 / 0)
        assert not stages.done("broken") and list(tmp_path.iterdir()) == []


def test_another_job_is_refused_by_the_file_that_the_job_is_noted_in(tmp_path):
    folder(tmp_path).note()
    with pytest.raises(InputError, match="holds a benchmark of another job: its k is 8 there and 9 here; choose"):
        folder(tmp_path, JOB | {"k": 9})
    nested = folder(tmp_path / "nested", key="recipe")
    nested.note(points=[1])
    assert nested.noted() == {"recipe": JOB, "points": [1]}
    assert folder(tmp_path / "nested", key="recipe").noted()["points"] == [1]
    with pytest.raises(InputError, match="its seed is 0 there and 1 here"):
        folder(tmp_path / "nested", JOB | {"seed": 1}, key="recipe")
    nested.file.write_text("{")  # not what anybody wrote
    with pytest.raises(InputError, match="its seed is None there and 0 here"):
        folder(tmp_path / "nested", key="recipe")


def test_what_is_noted_beside_the_job_may_differ_and_goes_with_a_job_that_did_nothing(tmp_path):
    begun = folder(tmp_path / "a", but=("points",))
    begun.note(points=[])
    assert folder(tmp_path / "a", but=("points",)).noted() == JOB | {"points": []}
    begun.discard()
    assert not (tmp_path / "a").exists()
    begun.note(points=[])
    (tmp_path / "a" / "run").write_text("work")
    begun.discard()
    assert begun.noted() == JOB | {"points": []}

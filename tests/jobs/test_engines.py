"""The same bytes whoever works: processes, parts that are merged, ranks of Lightning, workers of Ray."""

import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest

from mmsae.activations.command import extract_command
from mmsae.activations.extract import extract
from mmsae.cli import command_parser, main
from mmsae.filtering.command import filter_command
from mmsae.filtering.job import FilterJob
from mmsae.filtering.options import Keeping, Scoring
from mmsae.interpret.evidence.command import evidence
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.jobs.engines import engine_of
from mmsae.jobs.lightning import LitJob
from mmsae.jobs.processes import Local
from mmsae.jobs.queue import Merging, PartOf
from mmsae.jobs.status import job_status
from mmsae.jobs.tally import UnitsFailed
from mmsae.options import Run, SAERun, Spread, UniqueData, call
from mmsae.types import InputError
from tests.helpers.evaluation import save_host, save_sae, write_colours
from tests.helpers.filtering import tree

QUIET = {"device": "cpu", "workers": 0, "batch_size": 8, "progress": False}
KEEP = {"keep": 0.5, "per_shard": 12, "report": False}
SEE = {"n_top": 5, "quantiles": 3, "each": 2, "negatives": 5, "min_items": 3, "candidates": 40, "keep_gb": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    host = save_host(root / "host")
    write_colours(root / "shards", 40, seed=3, per_shard=10)
    save_sae(root / "sae", host, site="image.embed", modalities=("image", "text"), d_sae=40)
    return root


def extracted(root, out, **spread):
    given = {"host": f"local-dir:{root / 'host'}", "shards": str(root / "shards"), "out": str(out)}
    return call(extract_command, **given | QUIET | spread)


def filtered(root, out, **spread):
    given = {"sae": str(root / "sae"), "shards": str(root / "shards"), "out": str(out)}
    return call(filter_command, **given | KEEP | QUIET | spread)


def seen(root, out, **spread):
    return call(evidence, sae=str(root / "sae"), shards=str(root / "shards"), out=str(out), **SEE, **QUIET, **spread)


JOBS = {"extract": extracted, "filter": filtered, "evidence": seen}
ROUNDS = {"extract": 1, "filter": 2, "evidence": 2}  # passes that need what was merged of the one before


@pytest.fixture(scope="module")
def whole(root):
    """Each result, made by one process."""
    for name, job in JOBS.items():
        job(root, root / name)
    return {name: tree(root / name) for name in JOBS}


def in_parts(name, root, out):
    for i in range(ROUNDS[name]):
        for part in ("2/3", "1/3", "3/3", "1/3"):
            assert JOBS[name](root, out, part=part) is None
            assert not job_status(out).finished
        made = JOBS[name](root, out, merge=True)
        assert (made is None) == (i + 1 < ROUNDS[name])
    assert job_status(out).finished


class Predicted(LitJob):
    """A job on the ranks of a trainer."""

    def __init__(self, do):
        super().__init__()
        self.do = do

    def work(self, ranks, device):
        self.do(ranks)


def by_lightning(name, root, out):
    given = str(root / "sae"), str(root / "shards"), str(out)
    run, of_host = SAERun(**QUIET), Run(**QUIET)
    do = {
        "extract": lambda r: extract(f"local-dir:{root / 'host'}", given[1], out, run=of_host, engine=r),
        "filter": lambda r: FilterJob(*given, "", Scoring(), Keeping(**KEEP), run, UniqueData(), r).run(),
        "evidence": lambda r: collect_evidence(*given, choice=Evidencing(**SEE), run=run, engine=r),
    }[name]
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.predict(Predicted(do))


def by_ray(name, root, out):
    JOBS[name](root, out, engine="ray")


CASES = [(how, name) for how in (in_parts, by_lightning) for name in JOBS]
CASES += [pytest.param(by_ray, n, marks=pytest.mark.slow if n == "extract" else pytest.mark.long) for n in JOBS]


@pytest.mark.parametrize(("how", "name"), CASES)
def test_the_same_bytes(how, name, root, whole, tmp_path, request):
    if how is by_ray:
        request.getfixturevalue("ray_of_one")
    how(name, root, tmp_path / "out")
    assert tree(tmp_path / "out") == whole[name] and len(whole[name]) > 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def command(name, root, out, *more):
    given = ["--shards", str(root / "shards"), "--out", str(out), "--device", "cpu", "--workers", "0"]
    given += ["--batch-size", "8", "--progress", "false", *more]
    main(
        [
            name,
            *(["--host", f"local-dir:{root / 'host'}"] if name == "extract" else ["--sae", str(root / "sae")]),
            *given,
        ]
    )


def test_an_array_of_slurm_and_its_status(root, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "store"
    for k, v in {"COUNT": 2, "MIN": 0, "MAX": 1, "STEP": 1, "ID": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{k}", str(v))
    command("extract", root, out)
    assert "part 2/2: 2 shards" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        main(["status", str(out)])
    said = capsys.readouterr().out.splitlines()
    assert e.value.code == 1 and said[0].startswith(f"{out}: not finished, last written")
    assert said[1].startswith("  store: 2 of 4 shards done, 2 missing, 0 failed")
    with pytest.raises(SystemExit) as e:
        command("extract", root, out, "--merge")
    assert e.value.code == 2 and "2 of 4 shards are not done, so there is nothing to merge" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    command("extract", root, out)
    with pytest.raises(SystemExit):
        main(["status", str(out)])
    assert capsys.readouterr().out.endswith("next: the same command with --merge, or without --part\n")
    command("extract", root, out, "--merge")
    main(["status", str(out)])
    assert capsys.readouterr().out.endswith(f"{out}: finished\nnext: nothing: it is finished\n")
    assert tree(out) == whole["extract"]
    command("extract", root, tmp_path / "alone", "--part", "none")
    assert tree(tmp_path / "alone") == whole["extract"]


@pytest.mark.parametrize("how", ["processes", "part", "lightning"])
def test_a_unit_that_fails_is_named_and_the_others_are_done(root, whole, tmp_path, capsys, monkeypatch, how):
    from mmsae.activations.extract import HostPart

    real, out = HostPart.add, tmp_path / "o"

    def breaks(self, batch, log):
        if "000002" in self.part.source:
            raise RuntimeError("the host gave up")
        return real(self, batch, log)

    def work():
        if how == "lightning":
            by_lightning("extract", root, out)
        else:
            command("extract", root, out, *(["--part", "1/1"] if how == "part" else []))

    monkeypatch.setattr(HostPart, "add", breaks)
    with pytest.raises(UnitsFailed if how == "lightning" else SystemExit) as e:
        work()
    said = capsys.readouterr().err
    if how == "lightning":
        said += str(e.value)
    else:
        assert e.value.code == 2
    assert "1 of 4 shards failed, the others are done" in said and "in breaks" in said  # the place of a fault of code
    assert "000002.tar: RuntimeError: the host gave up" in said
    with pytest.raises(SystemExit):
        main(["status", str(out)])
    said = capsys.readouterr().out
    assert "3 of 4 shards done, 0 missing, 1 failed" in said and "000002.tar: RuntimeError: the host gave up" in said
    monkeypatch.undo()
    work()
    if how == "part":
        command("extract", root, out, "--merge")
    assert tree(out) == whole["extract"] and not list(out.glob("*.failed"))


@pytest.mark.parametrize(
    ("name", "what"), [("extract", "  1 shards, about 10 samples: "), ("filter", "fit: 1 shards, ab")]
)
def test_a_part_says_what_it_has_to_do(root, tmp_path, capsys, name, what):
    JOBS[name](root, tmp_path / "o", part="2/4", progress=True)
    assert what in capsys.readouterr().out
    JOBS[name](root, tmp_path / "o", part="5/5", progress=True)  # which has none of the four
    assert " about " not in capsys.readouterr().out


@pytest.mark.slow
def test_a_shard_that_always_fails_stops_no_other_process(root, tmp_path, capsys):
    shards = sorted(map(str, (root / "shards").glob("*.tar")))
    shards[1] = f"pipe:cat {shards[1]}; exit 3"
    with pytest.raises(UnitsFailed, match=r"1 of 4 shards failed, the others are done;.*pipe:cat .*000001.tar; exit 3"):
        extracted(root, tmp_path / "o", shards=shards, devices=2)
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / "o")])
    assert "3 of 4 shards done, 0 missing, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"part": "3/2"}, "part is 3/2; it is I/N, the I-th of N parts"),
        ({"part": "1/2", "merge": True}, "part is 1/2 and merge is asked for"),
        ({"part": "1/2", "engine": "ray"}, "engine is ray and part is 1/2"),
        ({"merge": True, "engine": "ray"}, "engine is ray and merge is asked for"),
        ({"gpus": 0.5}, "gpus is 0.5 and engine processes; only ray shares GPUs"),
        ({"devices": 0}, "devices is 0; it must be at least 1"),
        ({"retries": -1}, "retries is -1; it must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, words):
    with pytest.raises(InputError, match=words):
        engine_of(Spread(**asked))


def test_which_engine_it_is():
    assert [type(engine_of(Spread(**s))) for s in ({}, {"part": "1/2"}, {"merge": True}, {"part": "none"})] == [
        *(Local, PartOf, Merging, Local)
    ]
    assert engine_of(Spread(devices=3)).size == 3 and engine_of(Spread(part="2/4", devices=2)).size == 2


def test_no_job_has_no_status(tmp_path):
    with pytest.raises(InputError, match=r"x is not there, nor x\.partial: no job has begun"):
        job_status(tmp_path / "x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").touch()
    with pytest.raises(InputError, match="holds no job that goes shard by shard"):
        job_status(tmp_path / "x")
    (tmp_path / "x" / "results.json").write_text(json.dumps({}))
    assert job_status(Path(tmp_path / "x")).finished


SCALE = Path(__file__).parents[2] / "configs" / "scale"
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$LOG"
case "$(basename "$0")" in
  sbatch) n=$(grep -c ^sbatch "$LOG"); echo "$n";;
  scontrol) printf 'node1\\nnode2\\n';;
  srun) while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; "$@";;
esac
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Commands of a cluster that only write down what they are asked; returns how to run a script and read that."""
    for name in ("sbatch", "scontrol", "srun", "ray", "mmsae"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)

    def run(script, *args, **environment):
        given = {"SAE": "sae", "SHARDS": "shards/*.tar", "OUT": "kept", "LOG": str(tmp_path / "log"), "WAIT": "0"}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", str(SCALE / script), *args], env={**os.environ, **given, "PATH": path, **environment},
                       check=True, timeout=60)  # fmt: skip
        return (tmp_path / "log").read_text().splitlines()

    return run


def options_of(line):
    """What ``mmsae filter`` makes of a line that a script has it run."""
    program, command, *args = shlex.split(line)
    assert (program, command) == ("mmsae", "filter")
    return command_parser("filter")[0].parse_args(args)


def test_the_example_of_a_queue_submits_parts_and_merges(cluster):
    lines = cluster("submit.sh", "64")
    script = str(SCALE / "filter.sbatch")
    assert lines == [
        f"sbatch --parsable --export=ALL --array=0-63 {script}",
        f"sbatch --parsable --export=ALL --dependency=afterok:1 {script} --merge",
        f"sbatch --parsable --export=ALL --dependency=afterok:2 --array=0-63 {script}",
        f"sbatch --parsable --export=ALL --dependency=afterok:3 {script} --merge",
    ]
    [part] = cluster("filter.sbatch")[4:]
    merge = cluster("filter.sbatch", "--merge")[-1]
    assert not options_of(part).merge and options_of(merge).merge and options_of(part).out == "kept"


def test_the_example_of_ray_starts_a_cluster_and_the_job(cluster, tmp_path):
    cluster("ray.sbatch", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_NUM_NODES="2")
    until = time.monotonic() + 20
    while (lines := (tmp_path / "log").read_text()).count("ray start") < 4 and time.monotonic() < until:
        time.sleep(0.05)  # they run beside the script, and may be later than its end
    lines = lines.splitlines()
    assert any(x.startswith("ray start --head --port=6379") for x in lines)
    assert "ray start --address=node1:6379 --block" in lines
    [job] = [x for x in lines if x.startswith("mmsae")]
    assert options_of(job).engine == "ray" and options_of(job).gpus == 0.5

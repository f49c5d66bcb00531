"""Units on workers of a Ray cluster: one is killed, others come and go, some units always fail, none can begin."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")
import ray

from mmsae.errors import EndsJob, InputError
from mmsae.jobs import ray as module
from mmsae.jobs.ray import RayWorkers
from mmsae.jobs.tally import Tally, UnitsFailed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(sigterm_as_before):
    """Two machines of one CPU each, which are processes here."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def engine(cluster):
    with RayWorkers(None, 0, progress=False) as engine:
        engine.decoders(0)
        yield engine


@pytest.fixture
def tally(tmp_path):
    tally = Tally(tmp_path / "parts", [f"{i}.tar" for i in range(8)], [f"{i}.part" for i in range(8)])
    tally.note()
    return tally


def there(rank, tally, trouble):
    """Writes part files that say which process did it; trouble is ``{unit: what happens there}``."""
    with open(tally.folder / f"begun-{os.getpid()}", "a") as f:
        f.write("x")
    if "begin" in trouble:
        raise InputError(trouble["begin"])

    def work(share):
        (unit,) = share.units
        what, met = trouble.get(unit), tally.folder / f"met-{unit}"
        first = not met.exists()
        with open(met, "a") as f:
            f.write("x")
        if what == "dies" or (what == "dies once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        while what == "together" and len(list(tally.folder.glob("begun-*"))) < 3:
            time.sleep(0.1)
        if what == "memory":
            raise MemoryError("cannot allocate")
        if what == "input":
            raise InputError("its caption is missing")
        if what == "ends":
            raise EndsJob("the disk is full")
        if what != "elsewhere":
            (tally.folder / f"{unit}.part").write_text(str(os.getpid()))

    return work


def run(engine, tally, trouble=None):
    engine.run(tally, tally.missing(), None, there, tally, trouble or {})


def times(tally, kind, *names):
    return [len((tally.folder / f"{kind}-{n}").read_text()) for n in names]


def test_a_worker_is_killed_and_its_unit_is_done_by_another(engine, tally, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(engine, tally._replace(folder=Path("parts")), {3: "dies once"})  # a path as the leading process sees it
    assert tally.missing() == [] and tally.failed() == {}
    begun = {p.name.split("-")[1]: p.read_text() for p in tally.folder.glob("begun-*")}
    did = {p.read_text() for p in tally.folder.glob("*.part")}
    assert did <= set(begun) and str(os.getpid()) not in begun and times(tally, "met", *range(5)) == [1, 1, 1, 2, 1]
    assert len(begun) <= 3 and set(begun.values()) == {"x"}  # two, and one for the killed; each loads once


@pytest.mark.long
def test_units_that_always_fail_are_named_and_the_others_are_done(engine, tally, monkeypatch):
    monkeypatch.setattr(engine, "retries", 1)
    with pytest.raises(UnitsFailed, match="4 of 8 shards failed, the others are done; the same command tries") as e:
        run(engine, tally, {1: "input", 4: "dies", 6: "memory", 7: "elsewhere"})
    said = str(e.value)
    assert "1.tar: its caption is missing;" in said
    assert "4.tar: its worker was killed or crashed, for want of memory perhaps (2 times)" in said
    assert "6.tar: MemoryError: cannot allocate (2 times)" in said
    assert "7.tar: " in said and "has done it, and its part is not here: workers need one file system" in said
    assert tally.missing() == [1, 4, 6, 7] and set(tally.failed()) == {1, 4, 6, 7}
    assert times(tally, "met", 1, 4, 6) == [1, 2, 2]  # what is wrong with the input is wrong every time
    run(engine, tally)
    assert tally.missing() == [] and tally.failed() == {}


@pytest.mark.long
def test_workers_join_and_leave(engine, tally, cluster, monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.5)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    assert engine.size == 3
    engine.run(tally, [0, 1, 2, 3], None, there, tally, dict.fromkeys(range(4), "together"))
    assert len(engine.workers) == 3 and tally.missing() == [4, 5, 6, 7]
    cluster.remove_node(node)  # with its worker
    run(engine, tally)
    assert tally.missing() == [] and len(engine.workers) <= 2


@pytest.mark.long
def test_what_all_would_meet_ends_the_job(engine, tally, monkeypatch):
    with pytest.raises(UnitsFailed, match=r"[34] of 8 shards failed, 0 are done, and [45] were not tried"):
        run(engine, tally, dict.fromkeys(range(8), "input"))
    with pytest.raises(EndsJob, match="the disk is full"):
        run(engine, tally, {0: "ends"})
    monkeypatch.setattr(engine, "devices", 1)
    monkeypatch.setattr(module, "TRIED", 2)
    with pytest.raises(InputError, match="no worker of Ray can begin: the SAE is of another host"):
        run(engine, tally, {"begin": "the SAE is of another host"})


def memory():
    """Bytes of this machine, and how many of them are taken."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return kib["MemTotal"] << 10, (kib["MemTotal"] - kib["MemAvailable"]) << 10


@pytest.mark.long
def test_a_worker_that_takes_too_much_memory_is_ended_by_ray_and_its_unit_named(tmp_path):
    have, taken = memory()
    room, asked = 7 << 29, 6 << 30  # a worker with its libraries takes under 1 GiB
    if have - taken < asked + (1 << 30):
        pytest.skip(f"{(have - taken) / 2**30:.1f} GiB of memory are free, 7 are needed")
    env = {"RAY_memory_usage_threshold": str((taken + room) / have), "RAY_memory_monitor_refresh_ms": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.ray_memory", tmp_path / "parts", str(asked)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert "1 of 4 shards failed, the others are done" in done.stdout, done.stderr
    assert "1.tar: its worker was ended, because the machine ran out of memory (2 times)" in done.stdout


def test_sigterm_does_afterwards_what_it_did():
    """Ray's own handler ended a training that came later in the same process, before its step was saved."""
    code = (
        "import signal\n"
        "from mmsae.jobs.ray import RayWorkers\n"
        "mine = lambda *_: None\n"
        "signal.signal(signal.SIGTERM, mine)\n"
        "with RayWorkers(1, 0, progress=False):\n"
        "    assert signal.getsignal(signal.SIGTERM) is not mine, 'Ray has no handler any more'\n"
        "assert signal.getsignal(signal.SIGTERM) is mine"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

"""A command keeps the memory that it frees, a library does not, and the user's own settings go first."""

import os
import platform
import subprocess
import sys

import pytest

from mmsae.allocator import OWN, keep_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is set")

MB = 64
FAULTS = f"""
import resource
import numpy as np

def faults(uses=8):
    "Page faults of a buffer that is made, filled and freed again and again, after the first time."
    for i in range(uses + 1):
        if i == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones({MB} << 20, dtype=np.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / uses
"""
PAGES = MB * 2**20 / os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 0


def faults(code, **env):
    """Page faults per use of a buffer of 64 MB, in a Python that has run some code."""
    clean = {k: v for k, v in os.environ.items() if k not in (*OWN, "GLIBC_TUNABLES")}
    run = [sys.executable, "-c", f"{FAULTS}\n{code}\nprint(faults())"]
    # transparent huge pages, which numpy asks for, would count as one fault per 2 MB
    done = subprocess.run(run, capture_output=True, text=True, env=clean | {"NUMPY_MADVISE_HUGEPAGE": "0"} | env)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_a_buffer_is_paid_for_once():
    assert faults("import mmsae.cli") > 0.9 * PAGES  # what is imported changes nothing
    assert faults("from mmsae.allocator import keep_memory; assert keep_memory()") < 0.01 * PAGES


def test_every_command_does_it():
    assert faults("from mmsae.cli import main; main(['info', 'tests/before/files/sae/shared'])") < 0.01 * PAGES


@pytest.mark.slow
def test_processes_that_a_job_starts_do_it(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        f"""{FAULTS}
from pathlib import Path
from mmsae.jobs.processes import Local
from mmsae.jobs.tally import Tally

def there(rank):
    return lambda share: print(faults(), flush=True)

if __name__ == "__main__":
    with Local(2) as processes:
        processes.deal(Tally(Path(), [], []), [0, 1], there(0), there)
"""
    )
    env = {k: v for k, v in os.environ.items() if k not in OWN} | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    told = [float(line) for line in done.stdout.split()]
    assert len(told) == 2 and max(told) < 0.01 * PAGES


@pytest.mark.parametrize("name", [*OWN, "GLIBC_TUNABLES"])
def test_the_users_own_settings_go_first(name, monkeypatch):
    value = "glibc.malloc.mmap_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    monkeypatch.setenv(name, value)
    assert not keep_memory()

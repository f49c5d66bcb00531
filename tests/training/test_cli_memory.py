"""The memory that a training takes does not grow with the store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmsae.activations import write_store
from tests.helpers.stores import peak
from tests.helpers.training import RECIPE, SMALL, environment

ROWS, WIDTH = 5_000, 256
SHARD = 2 * ROWS * WIDTH * 4  # bytes of both modalities


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs")
    # in an interpreter of its own: a process that has called backward cannot fork one that does
    args = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split()[-2:])
    print(f"2 shards: {small / 1e6:.0f} MB, 8 shards: {large / 1e6:.0f} MB more than a small training")
    assert large - small < 0.4 * 6 * SHARD


def measure(folder):
    """Prints the bytes that trainings on two and on eight shards add."""

    def store(n):
        x = {m: torch.randn(n, WIDTH) for m in ("image", "text")}
        return str(write_store(folder / str(n), x, rows_per_shard=ROWS))

    few, *others = (store(n) for n in (1000, 2 * ROWS, 8 * ROWS))

    def grown(large, shards):
        def work(i):
            from mmsae.cli import main

            sys.stdout = open(os.devnull, "w")
            steps = int(0.9 * shards * ROWS / 512) if i else 1  # one pass over everything
            options = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
            options += ["--data.store", large if i else few, "--trainer.default_root_dir", str(folder / "run")]
            options += ["--data.batch_size", "512", "--data.block", "16", "--trainer.enable_progress_bar", "false"]
            main(["fit", "-c", RECIPE, *SMALL, *options, "--model.normaliser_rows", "2048"])

        return peak(work)

    print(grown(others[0], 2), grown(others[1], 8))


if __name__ == "__main__":
    measure(Path(sys.argv[1]))

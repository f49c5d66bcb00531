"""The memory that a training takes does not grow with the store."""

import os
import sys

import pytest
from training_helpers import RECIPE, ROOT, SMALL, make_store

sys.path.insert(0, str(ROOT / "tests" / "cache"))
from cache_helpers import peak

ROWS, WIDTH = 10_000, 128
SHARD = 2 * ROWS * WIDTH * 4  # bytes of both modalities


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    def grown(shards):
        stores = [
            make_store(tmp_path / f"{shards}-{n}", n=n, d=WIDTH, rows_per_shard=ROWS) for n in (2000, shards * ROWS)
        ]

        def work(i):
            from mmsae.cli import main

            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            steps = int(0.9 * shards * ROWS / 512) if i else 2  # one pass over everything
            options = ["--data.batch_size", "512", "--trainer.max_steps", str(steps), "--data.block", "64"]
            options += ["--trainer.val_check_interval", str(steps), "--trainer.enable_progress_bar", "false"]
            run = tmp_path / f"run-{shards}-{i}"
            main(
                [
                    "fit",
                    "-c",
                    RECIPE,
                    "--data.store",
                    stores[i],
                    *SMALL,
                    "--trainer.default_root_dir",
                    str(run),
                    *options,
                ]
            )

        return peak(work)

    small, large = grown(2), grown(8)
    print(f"2 shards: {small / 1e6:.0f} MB, 8 shards: {large / 1e6:.0f} MB more than a small training")
    assert large - small < 0.5 * 6 * SHARD

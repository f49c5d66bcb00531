"""A Ray cluster for the tests of a file."""

import os

import pytest


@pytest.fixture(scope="module")
def ray_of_one():
    """One worker on this machine."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()

"""A Ray cluster for the tests of a file."""

import os
import signal

import pytest


@pytest.fixture(scope="module")
def sigterm_as_before():
    """What SIGTERM does is again what it did: Ray leaves a handler to whatever comes after it in the process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def ray_of_one(sigterm_as_before):
    """One worker on this machine."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()

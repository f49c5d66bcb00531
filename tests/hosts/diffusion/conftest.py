"""Tiny pipelines, made once a test file."""

import pytest

from mmsae.hosts import DiffusionHost
from tests.helpers.diffusion import MAKE


@pytest.fixture(scope="module")
def hosts():
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = DiffusionHost(MAKE[kind](), kind)
        return made[kind]

    return get

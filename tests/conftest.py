"""What has to be settled before any test is imported."""

import os
from collections import Counter

import pytest
import torch

# Triton reads it when it is first imported, which lightning and transformers do too. Without a device its kernels can
# run in no other way, and nothing else here needs triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have most tests marked ``slow``: at the end one process would run them alone."""
    slow = Counter(i.path for i in items if i.get_closest_marker("slow"))
    items.sort(key=lambda i: -slow[i.path])

"""What has to be settled before any test is imported."""

import os

import torch

# Triton reads it when it is first imported, which lightning and transformers do too. Without a device its kernels can
# run in no other way, and nothing else here needs triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

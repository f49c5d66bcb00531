"""What a host or an SAE is: a hash of configuration and weights. A path or a hub name is a hint for reloading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """blake2b-128 over the canonical JSON of ``config`` and the name, dtype, shape and bytes of every tensor.

    Args:
        config: Plain values; tuples and lists count as equal.
        state: A ``state_dict``, on any device.

    Returns:
        32 hex digits, independent of device and of the order of either mapping.
    """
    h = hashlib.blake2b(json.dumps(config, sort_keys=True, separators=(",", ":")).encode(), digest_size=16)
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        h.update(f"\n{name}|{t.dtype}|{tuple(t.shape)}\n".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()

"""Which tokens of an image tower are patches."""

from __future__ import annotations

import torch
from torch import Tensor

from mmsae.backbones.tokens import Marks


def image_marks(tokens: Tensor, prefix: int, patches: int | None) -> Marks:
    """Marks of ``tokens (B, T, d)``.

    Args:
        tokens: The host's tokens.
        prefix: How many class and register tokens the tower puts before the patches.
        patches: How many patches it has, None if it does not say. A layer before the class token was added has just
            these, and no prefix.
    """
    b, t, _ = tokens.shape
    known = not prefix or patches is None or t in (patches, patches + prefix)
    if not known or t == patches:
        prefix = 0
    content = (torch.arange(t, device=tokens.device) >= prefix).expand(b, t)
    return Marks(content, ~content, 0 if prefix else None, known=known)

"""``mmsae weights`` as a LightningModule, with its page."""

from __future__ import annotations

from mmsae.lvlm.weights.command import LitWeights
from mmsae.lvlm.weights.gallery import write_gallery


class Weights(LitWeights):
    """``mmsae weights`` on the ranks of a trainer, with ``gallery.html``."""

    present = staticmethod(write_gallery)

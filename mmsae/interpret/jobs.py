"""What ``mmsae predict`` runs of filtering: the jobs of ``mmsae filter`` and ``mmsae weights`` with their pages."""

from __future__ import annotations

from mmsae.interpret.filter_report import write_filter_report
from mmsae.interpret.token_gallery import write_gallery
from mmsae.tasks.filter_lit import LitFilter
from mmsae.tasks.weights import LitWeights


class Filter(LitFilter):
    """``mmsae filter`` on the ranks of a trainer, with ``report.html``."""

    present = staticmethod(write_filter_report)


class Weights(LitWeights):
    """``mmsae weights`` on the ranks of a trainer, with ``gallery.html``."""

    present = staticmethod(write_gallery)

"""``mmsae filter`` as a LightningModule: the same stages and files, with the ranks of a trainer as processes."""

from __future__ import annotations

from mmsae.filtering.job import FilterJob
from mmsae.filtering.options import Keeping, Scoring
from mmsae.jobs.lightning import LitJob, Ranks
from mmsae.options import RankRun, UniqueData, flat


@flat
class Filter(LitJob):
    """``mmsae filter`` on the ranks of a trainer.

    Args:
        sae: SAE folder or hub id.
        shards: What to filter: path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL,
            or a list of them (docs/how-to/data.md).
        out: Folder of the result; it appears when everything is done.
        host: Name of the host; default: the one that the SAE was trained on.
    """

    def __init__(
        self,
        sae: str,
        shards: str | list[str],
        out: str,
        host: str = "",
        scoring: Scoring = Scoring(),
        keeping: Keeping = Keeping(),
        run: RankRun = RankRun(),
        data: UniqueData = UniqueData(),
    ):
        super().__init__()
        self.given = (sae, shards, out, host, scoring, keeping)
        self.run, self.data = run, data

    def work(self, ranks: Ranks, device: str) -> None:
        out = FilterJob(*self.given, self.run.on(device), self.data, ranks).run()
        if ranks.lead:
            print(out)

"""``mmsae evidence`` as a LightningModule."""

from __future__ import annotations

from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.jobs.lightning import LitJob, Ranks
from mmsae.options import Data, Drawing, RankRun, Spread, flat


@flat
class Collect(LitJob):
    """``mmsae evidence`` on the ranks of a trainer.

    Args:
        sae: SAE folder or hub id; of several of the same sites (an SAE and its controls) the host reads the data once.
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or several
            (docs/how-to/data.md); for SAEs of texts and of denoisers also a .txt file with a caption a line.
        out: Folder to write; one for each SAE.
        host: Name of the host; default: the SAE's own.
    """

    def __init__(
        self,
        sae: str | list[str],
        shards: str | list[str],
        out: str | list[str],
        host: str = "",
        choice: Evidencing = Evidencing(),
        run: RankRun = RankRun(),
        data: Data = Data(),
        drawing: Drawing = Drawing(),
    ):
        super().__init__()
        self.given, self.run = (sae, shards, out, host, choice), run
        self.data, self.drawing = data, drawing

    def work(self, ranks: Ranks, device: str) -> None:
        collect_evidence(*self.given, self.run.on(device), self.data, Spread(), self.drawing, ranks)

"""``mmsae weights`` as a LightningModule."""

from __future__ import annotations

from mmsae.jobs.lightning import LitJob, Ranks
from mmsae.lvlm.options import Definition, TokenSample
from mmsae.lvlm.weights.job import cross_modal_weights
from mmsae.options import RankRun, Shards, flat


@flat
class Weights(LitJob):
    """``mmsae weights`` on the ranks of a trainer.

    Args:
        sae: SAE folder or hub id, trained on image and text tokens of a vision-language model.
        shards: Path, folder, glob or brace pattern of tars, parquet files or images, here or at a URL, or several
            (docs/how-to/data.md).
        out: Folder to write.
        host: Name of the host (``lvlm:FOLDER`` or ``lvlm:HUB_ID``); default: the SAE's own.
    """

    def __init__(
        self,
        sae: str,
        shards: str | list[str],
        out: str,
        host: str = "",
        definition: Definition = Definition(),
        sample: TokenSample = TokenSample(),
        run: RankRun = RankRun(batch_size=8, workers=0),
        data: Shards = Shards(),
    ):
        super().__init__()
        self.given = (host, sae, shards, out, definition, sample)
        self.run, self.data = run, data

    def work(self, ranks: Ranks, device: str) -> None:
        cross_modal_weights(*self.given, self.run.on(device), self.data, (), ranks)

"""How the folders evidence and query were made, with the code of version 0.2.0.dev0 at commit 8ea36cd; kept to be read.

Run there, in this folder: ``PYTHONPATH=../../.. python make_evidence.py``.
"""

from mmsae.cli import main
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.metrics.concepts.query import write_query
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint

QUIET = ["--progress", "false"]
main(
    ["evidence", "--sae", "sae/paired", "--shards", "shards", "--out", "evidence", "--batch-size", "4", "--workers", "0"]
    + ["--min-items", "2", "--device", "cpu", *QUIET]
)
sae = sae_fingerprint(SAE.from_pretrained("sae/paired"))
write_query("query/query.json", "#3 & ~#5", sae, "a test")
names = {3: LatentName("red circle", "wpmi", score=1.5, auroc=0.9, by="captions"), 5: LatentName(None, "wpmi", note="never")}
write_names("query/names.json", names, sae)

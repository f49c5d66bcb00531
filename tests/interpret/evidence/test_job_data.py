"""Evidence of data that lies in other ways than in plain tars: the same items, codes and choices, bit for bit."""

import numpy as np
import pytest

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.options import SAERun
from mmsae.shards import ShardWriter
from tests.helpers.data_kinds import KINDS, laid_out
from tests.helpers.evaluation import png, save_host, save_sae

RUN = SAERun(device="cpu", workers=0, batch_size=4, progress=False)
CHOICE = Evidencing(n_top=5, quantiles=2, each=2, negatives=4, min_items=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    with ShardWriter(root / "tars", "s", per_shard=10) as w:
        for i in range(30):
            picture = png(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
            w.write(f"{i:05d}", {"png": picture, "txt": f"picture {i}", "json": {"uid": f"{i * 7919:032x}"}})
    sae = save_sae(root / "sae", save_host(root / "host"), site="image.embed", modalities=("image", "text"), d_sae=24)
    collect_evidence(sae, str(root / "tars"), root / "plain", choice=CHOICE, run=RUN)
    return root, sae, w.paths


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_evidence_whatever_the_data_lies_in(kind, made, tmp_path):
    root, sae, tars = made
    collect_evidence(sae, laid_out(kind, tars, tmp_path / "data"), tmp_path / "out", choice=CHOICE, run=RUN)
    a, b = Evidence(root / "plain"), Evidence(tmp_path / "out")
    assert a.items.uid == b.items.uid and a.items.caption == b.items.caption
    for file in root.joinpath("plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name

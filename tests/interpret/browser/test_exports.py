import json

import numpy as np
import pyarrow.parquet as pq

from mmsae.interpret.browser.options import Display
from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.browser import browser


def test_files_for_other_tools(tmp_path):
    folder, z = browser(tmp_path, display=Display(features=True))
    evidence = Evidence(tmp_path / "evidence")
    table = pq.read_table(folder / "exports" / "latents.parquet").to_pydict()
    assert table["latent"] == list(range(24)) and table["name"][:2] == ["word zero", None]
    assert table["text"][7].startswith("#7 word7")
    assert np.allclose(table["image.density"], (z["image"] > 0).any(1).mean(0))
    lines = [json.loads(x) for x in (folder / "exports" / "features.jsonl").read_text().splitlines()]
    assert [(x["modality"], x["feature_index"]) for x in lines] == [(m, j) for m in z for j in range(24)]
    line = lines[24 + 3]
    top = [i for i in evidence.top("text").item[3] if i >= 0]
    own = [a for a in line["activations"] if a["bin"] == 0]
    assert [a["item_id"] for a in own] == [evidence.items.uid[i] for i in top]
    for a, i in zip(own, top, strict=True):
        assert (
            np.isclose(a["value"], z["text"][i, :, 3].max(), atol=1e-5) and a["argmax"] == z["text"][i, :, 3].argmax()
        )
    assert sum(line["hist_heights"]) == (z["text"][..., 3] > 0).sum()
    assert len(line["hist_heights"]) == len(line["hist_values"]) and np.isclose(line["max"], z["text"][..., 3].max())
    assert lines[0]["explanation"]["text"] == "word zero" and lines[5]["explanation"] is None
    assert lines[23]["activations"] == [] and lines[23]["density"] == 0

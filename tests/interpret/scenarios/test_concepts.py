import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.errors import InputError
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scenarios.concepts import LeftOut, mined_concepts, present
from mmsae.interpret.scenarios.options import Mining
from mmsae.metrics.concepts.inverted import InvertedLists
from mmsae.metrics.concepts.names import LatentName, read_names
from mmsae.metrics.concepts.query import evaluate
from mmsae.world.generator.scene import CONCEPTS
from tests.helpers.scenarios import oracle_world


def test_present_is_what_a_query_over_percentiles_finds():
    rng = np.random.default_rng(0)
    z = np.round(rng.normal(size=(200, 12)) * (rng.random((200, 12)) < 0.3), 1)  # rounded: with ties
    matrix = csr_matrix(z)
    lists = {"image": InvertedLists.of(matrix)}
    for at in (0.0, 0.5, 0.9):
        table = present(matrix, at).toarray()
        for j in range(12):
            assert (table[:, j] == evaluate(f"#{j} > {at}", lists, holds=True)).all()
    assert present(csr_matrix((5, 3)), 0.5).nnz == 0


def test_only_named_rare_and_well_named_concepts_are_mined(tmp_path):
    oracle_world(tmp_path / "e")
    evidence = Evidence(tmp_path / "e")
    names = read_names(tmp_path / "e" / "names" / "names.json")
    options = Mining(present=0, dense=0.5)
    found = mined_concepts(evidence, names, options)
    assert "small" not in found.names or "large" not in found.names  # one of two is in more than half
    assert (
        "red" in found.names
        and found.table[:, found.names.index("red")].sum() == evidence.lists("image").row(CONCEPTS.index("red"))[0].size
    )
    names[CONCEPTS.index("red")] = LatentName("red", auroc=0.4)
    names[CONCEPTS.index("blue")] = LatentName(None)
    less = mined_concepts(evidence, names, Mining(present=0, dense=0.5, auroc=0.7))
    assert set(found.names) - set(less.names) == {"red", "blue"}
    assert less.left_out.badly_named == 1 and less.left_out.unnamed == found.left_out.unnamed + 1
    assert less.left_out.dense == found.left_out.dense and not set(found.left_out.dense) & set(found.names)
    more = mined_concepts(evidence, names, Mining(present=0, dense=0.5, unnamed=True))
    assert f"#{CONCEPTS.index('blue')}" in more.names
    few = Mining(present=0, dense=0.2)
    rare = mined_concepts(evidence, names, few)
    counts = {n: len(evidence.lists("image").row(j)[0]) / evidence.n for j, n in enumerate(CONCEPTS)}
    known = [n for n in CONCEPTS if n != "blue" and counts[n] > 0]
    assert set(rare.left_out.dense) == {n for n in known if counts[n] > 0.2} and len(rare.left_out.dense) > 3
    assert [counts[n] for n in rare.left_out.dense] == sorted((counts[n] for n in rare.left_out.dense), reverse=True)
    said = rare.left_out.said(few)
    assert f"{len(rare.left_out.dense)} that are present in more than 20% of the items (--dense): " in said
    assert rare.left_out.dense[0] in said and "1 without a name (--unnamed)" in said and "AUROC" not in said
    assert LeftOut().said(few) == ""
    with pytest.raises(InputError, match="0 are present in at most 1% of the items"):
        mined_concepts(evidence, names, Mining(dense=0.01))
    with pytest.raises(InputError, match="has no audio"):
        mined_concepts(evidence, names, Mining(modality="audio"))

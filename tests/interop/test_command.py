import json

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.cli import main
from mmsae.interop import convert, load
from mmsae.sae import Normaliser
from tests.helpers.foreign import rows, some_sae


def codes(sae, modality=None):
    return sae.encode(rows(), modality).to_dense()


def test_there_and_back_by_the_command_line(tmp_path, monkeypatch, capsys):
    sae = some_sae("topk", normaliser=Normaliser(centre=True))
    sae.save_pretrained(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    for words in ("own theirs --to sparsify", "--to saelens theirs third", "--checkpoint third --out again"):
        main(["convert", *words.split()])
        assert capsys.readouterr().out.strip() == words.replace("--to saelens ", "").split(" --to")[0].split()[-1]
    again = SAE.from_pretrained("again")
    torch.testing.assert_close(codes(again), codes(sae), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["mmsae"]["training"] == {"converted_from": "third"}


def test_one_modality_of_several_is_written_for_a_library_that_has_one(tmp_path):
    sae = some_sae("topk", normaliser=Normaliser(centre=True), modalities=("image", "text"))
    sae.save_pretrained(tmp_path / "own")
    again = load(convert(str(tmp_path / "own"), str(tmp_path / "out"), "saelens", modality="text"))
    torch.testing.assert_close(codes(again), codes(sae, "text"), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="say which"):
        convert(str(tmp_path / "own"), str(tmp_path / "out"), "saelens")
    with pytest.raises(InputError, match="are named: image, text; modality has no effect"):
        convert(str(tmp_path / "own"), str(tmp_path / "out"), modality="text")


def test_an_unnamed_modality_is_named(tmp_path):
    convert(str(some_sae("topk").save_pretrained(tmp_path / "own")), str(tmp_path / "s"), "sparsify")
    assert SAE.from_pretrained(convert(str(tmp_path / "s"), str(tmp_path / "t"), modality="text")).modalities == (
        "text",
    )


def test_wrong_calls_are_one_sentence_each(tmp_path):
    folder = str(some_sae("topk").save_pretrained(tmp_path / "own"))
    with pytest.raises(InputError, match="give SRC or --checkpoint: neither is given"):
        convert(dst="x")
    with pytest.raises(InputError, match="give DST or --out: both are given"):
        convert(folder, "x", out="y")
    with pytest.raises(InputError, match=r"to must be one of mmsae, saelens, .* not 'sae_lens'"):
        convert(folder, "x", "sae_lens")
    with pytest.raises(InputError, match="is of mmsae, which takes no k"):
        convert(folder, str(tmp_path / "x"), k=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for to in ("mmsae", "saelens", "sparsify", "dictionary_learning", "visaebench"):
        with pytest.raises(InputError, match="holds other things"):
            convert(folder, str(tmp_path / "full"), to)

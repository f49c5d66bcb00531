"""``mmsae control``: random weights as a folder, as sparse as the SAE."""

from dataclasses import replace

import pytest
import torch

from mmsae import SAE
from mmsae.activations import ActivationStore, write_store
from mmsae.cli import main
from mmsae.sae import JumpReLU, Normaliser, TopK

N = 3000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of two modalities and SAEs of its sites."""
    root = tmp_path_factory.mktemp("control")
    torch.manual_seed(0)
    x = {m: torch.randn(N, 16) + i for i, m in enumerate(("image", "text"))}
    store = ActivationStore(write_store(root / "store", x))
    for name, selector in (("jumprelu", JumpReLU(per_modality=True)), ("topk", TopK(4))):
        sae = SAE(16, 48, selector=selector, normaliser=Normaliser(centre=True, scale="rms"))
        sae.fit_normaliser(x)
        if name == "jumprelu":
            with torch.no_grad():
                sae.selector.thresholds.copy_((0.5 + 2 * torch.rand(2, 48)).log())
        sae.sites = dict(store.spec.sites)
        sae.save_pretrained(root / name)
    return root, x


def test_of_thresholds_it_is_as_sparse_on_the_rows_of_a_store(made, tmp_path, capsys):
    root, x = made
    main(["control", "--sae", str(root / "jumprelu"), "--out", str(tmp_path / "c"), "--store", str(root / "store")])
    said = capsys.readouterr().out
    trained, control = SAE.from_pretrained(root / "jumprelu"), SAE.from_pretrained(tmp_path / "c")
    for m in x:
        fired = [(s.encode(x[m], m).to_dense() != 0).sum(0) for s in (trained, control)]
        assert torch.equal(*fired) and fired[0].any()
        assert f"{m} {fired[0].sum() / N:.1f} and {fired[1].sum() / N:.1f}" in said
    assert control.sites == trained.sites
    assert not torch.equal(control.encoder.weight, trained.encoder.weight)


def test_with_a_budget_it_needs_no_rows(made, tmp_path):
    root, x = made
    for seed in ("1", "2"):
        main(["control", "--sae", str(root / "topk"), "--out", str(tmp_path / seed), "--seed", seed])
    one, two = (SAE.from_pretrained(tmp_path / seed) for seed in "12")
    assert (one.encode(x["image"], "image").l0() <= 4).all() and not torch.equal(one.encoder.weight, two.encoder.weight)


def test_what_cannot_be_is_one_sentence_and_leaves_nothing(made, tmp_path, capsys):
    root, x = made
    sites = {m: replace(s, host="f" * 32) for m, s in SAE.from_pretrained(root / "topk").sites.items()}
    other = write_store(tmp_path / "other", x, sites=sites)
    for args, words in (
        (["--out", tmp_path / "c"], "name rows by which the control is made as sparse (--store)"),
        (
            ["--out", root / "jumprelu", "--store", root / "store"],
            "the SAE itself: its control needs a folder of its own",
        ),
        (["--out", tmp_path / "c", "--store", other], "this SAE was trained on"),
        (["--out", tmp_path / "c", "--store", root], "not an activation store"),
        (["--out", tmp_path / "c", "--store", root / "store", "--rows", "0"], "rows"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["control", "--sae", str(root / "jumprelu"), *map(str, args)])
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "c").exists()

"""Every command and every Python line in the README and in docs/ runs, at the size of a test.

The stand-ins: 20 shards of 8 generated samples under the README's names, and a VL-SAE state dict with its published
name and keys. Everything else is made by the README's own commands, one after the other, and the documents follow in
the same folder. See ``doc_blocks`` for what is appended to the commands; blocks marked ``<!-- not run: WHY -->`` are
parsed, and their recipes instantiated.
"""

import functools
import os

import pytest
import torch

from mmsae import SAE
from mmsae.world.generator.shards import write_world
from tests.helpers import doc_blocks


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The folder in which the README was followed, and the names that its Python blocks made."""
    place, before = tmp_path_factory.mktemp("readme"), os.getcwd()
    write_world(place / "shards", 160, prefix="train", per_shard=8, progress=False)
    width, latents = 64, 512
    state = {"encoder": torch.randn(latents, width)}
    for m in ("vision", "text"):
        state |= {f"{m}_decoder.weight": torch.randn(width, latents), f"{m}_decoder.bias": torch.randn(width)}
    torch.save(state, place / "openclip_ViT-B-32_VL_SAE_256_8_best.pth")
    os.chdir(place)
    try:
        yield place, doc_blocks.run_document(doc_blocks.README)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def follow(readme):
    """A function that follows a document after the README, once; returns the names that its Python blocks made."""

    @functools.cache
    def run(name):
        return doc_blocks.run_document(doc_blocks.ROOT / name)

    return run


def test_the_first_commands_are_demo_and_test():
    first = next(b for b in doc_blocks.blocks(doc_blocks.README) if b.language == "bash")
    assert doc_blocks.commands(first) == [["make", "demo"], ["make", "test"]]


def test_the_readme_runs_and_leaves_what_it_says(readme):
    place, names = readme
    for path in ("clip/open_clip_config.json", "store/spec.json"):
        assert (place / path).is_file(), path
    for path in ("sae", "sae-best", "checkpoints/last.ckpt", "latents.json", "logs"):
        assert (place / "runs/paired" / path).exists(), path
    assert names["x_hat"].shape == (160, 64) and names["codes"].l0().max() <= 4
    assert names["score"].shape == (2,) and names["values"].shape == (2, 5)
    assert names["table"].top(names["latent"])


def test_the_resumed_run_went_on(readme, follow):
    follow("docs/how-to/train.md")
    run = readme[0] / "runs/vl_sae"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert not (run / "sae-earlier").exists(), "the run started anew"


def test_published_checkpoints_are_converted(readme, follow):
    names = follow("docs/how-to/python.md")
    assert (readme[0] / "vl_sae_published/cfg.json").is_file() and names["published"].d_sae == 512
    assert names["x_hat"].shape == (160, 64) and names["table"].top(names["latent"])
    assert names["values"].shape == (2, 5)


def test_the_plain_loop_trains(readme, follow):
    place, names = readme[0], follow("docs/how-to/python.md")
    sae, x = SAE.from_pretrained(place / "runs/by_hand"), names["x"]
    torch.manual_seed(0)
    fresh = SAE(64, 512)
    assert sae.d_sae == 512

    def error(model):
        outputs = model(x)
        return sum(float((o.x_hat - x[m]).square().mean() / x[m].var(0).mean()) for m, o in outputs.items())

    assert error(sae) < 0.5 * error(fresh)
    for dictionary in sae.dictionaries.values():
        torch.testing.assert_close(dictionary.weight.norm(dim=1), torch.ones(512))


@pytest.mark.parametrize("document", doc_blocks.DOCS, ids=doc_blocks.name)
def test_documents_run(document, follow):
    follow(doc_blocks.name(document))


def test_a_block_that_does_not_run_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for text in ("```bash\nmake nothing\n```", "```bash\nmmsae info nowhere\n```", "```python\n1 / 0\n```"):
        page.write_text(text)
        with pytest.raises(AssertionError, match=r"page\.md:1 does not run"):
            doc_blocks.run_document(page)
    page.write_text("<!-- not run: network -->\n```bash\nmmsae extract --hots x\n```")
    with pytest.raises(AssertionError, match="unrecognized arguments: --hots"):
        doc_blocks.run_document(page)

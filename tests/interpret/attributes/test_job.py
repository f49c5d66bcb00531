"""``mmsae attributes`` on a tiny Stable Diffusion: what is drawn, planted words, resuming, refusals."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmsae import SAE
from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.sae import AffineEncoder, TopK, random_control
from mmsae.steering import Edit, Intervention, attach
from mmsae.steering.measure.scorers import CLIPJudge
from mmsae.steering.measure.sweep import noise
from tests.helpers.diffusion import sd
from tests.helpers.encoders import MODELS, save_local

SITE = "text_encoder.layers.1:out[all]"
PROMPTS = ["a red cat", "a photo of blue dog", "the green square", "a large circle", "a small cat", "black dog"]
WORDS = ["red", "green", "blue", "circle", "square", "small", "large", "left", "right"]
ASKED = ["--features", "3", "5", "--random", "4", "--directions", "2", "--steps", "2", "--batch-size", "4",
         "--shown", "2", "--progress", "false"]  # fmt: skip


def images_alone():
    """A host that embeds no texts."""
    return torch.nn.Flatten(), lambda image: torch.ones(3, 2, 2) * image.getpixel((0, 0))[0] / 255


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("attributes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd().save_pretrained(root / "pipeline")
    host = load_host(f"diffusers:{root / 'pipeline'}")
    torch.manual_seed(0)
    sae = SAE(32, d_sae=48, modalities=("text",), encoder=AffineEncoder(), selector=TopK(8))
    sae.sites = {"text": host.site(SITE)}
    sae.save_pretrained(root / "sae")
    save_local(root / "judge", MODELS["vit"])
    (root / "words.txt").write_text("\n".join(WORDS))
    return root


def command(made, out, *more, prompts=PROMPTS):
    return ["attributes", "--host", f"diffusers:{made / 'pipeline'}", "--sae", str(made / "sae"), "--judge",
            f"local-dir:{made / 'judge'}", "--vocabulary", str(made / "words.txt"), "--prompts", *prompts, "--out",
            str(out), *ASKED, *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(made):
    main(command(made, made / "done"))
    return made / "done"


def part(folder, name):
    return load_file(folder / "parts" / f"{name}.safetensors")


def test_parts_hold_what_the_judge_sees_of_steered_images(made, done):
    host, sae = load_host(f"diffusers:{made / 'pipeline'}"), SAE.from_pretrained(made / "sae")
    judge, seeds = CLIPJudge(load_host(f"local-dir:{made / 'judge'}")), [noise(0, i) for i in range(6)]

    def drawn(model, latent):
        iv = Intervention(Edit.add([latent], 1.0), "rel_norm", strength=0.5)
        with warnings.catch_warnings(), attach(host, {SITE: (model, iv)}) as log:
            warnings.simplefilter("ignore")
            images = host.generate(PROMPTS, seed=seeds, steps=2, guidance=3.0, batch_size=6)
        return images, log.relative

    plain = host.generate(PROMPTS, seed=seeds, steps=2, guidance=3.0, batch_size=6)
    torch.testing.assert_close(part(done, "unsteered")["embedding"], judge.images(plain), atol=1e-4, rtol=0)
    for name, model, latent in (("feature-5", sae, 5), ("direction-1", random_control(sae, 0), 1)):
        images, relative = drawn(model, latent)
        own = part(done, name)
        torch.testing.assert_close(own["embedding"], judge.images(images), atol=1e-4, rtol=0)
        assert own["relative"] == pytest.approx(relative, abs=1e-3) and relative == pytest.approx(0.5, abs=0.01)
        shown = (images[[1, 3]] * 255).round()  # of the prompts that confirm
        assert (own["images"].float() - shown).abs().max() <= 1
    names = {p.name for p in (done / "parts").iterdir()}
    random = {n for n in names if n.startswith("random")}
    assert len(names) == 9 and len(random) == 4 and not random & {"random-3.safetensors", "random-5.safetensors"}


def test_a_finished_run_is_not_drawn_again_and_another_is_refused(made, done, capsys):
    before = (done / "attributes.json").stat().st_mtime_ns
    main(command(made, done, "--progress", "true"))
    assert "finished before" in capsys.readouterr().out and (done / "attributes.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as e:
        main(command(made, done, "--strength", "0.7"))
    assert e.value.code == 2 and "strength is 0.5 there and 0.7 here" in capsys.readouterr().err


def test_planted_words_are_found_and_those_that_fail_on_other_prompts_are_not_confirmed(made, done, tmp_path):
    """Feature 3 moves all images towards ``red``, feature 5 those alone that words are looked for on."""
    import shutil

    shutil.copytree(done, tmp_path / "o")
    (tmp_path / "o" / "attributes.json").unlink()
    judge = CLIPJudge(load_host(f"local-dir:{made / 'judge'}"))
    text = judge.texts(WORDS)
    # only red grows: the direction that all other words are orthogonal to
    red = torch.linalg.lstsq(text, torch.eye(len(WORDS))[0]).solution
    base, g = part(done, "unsteered")["embedding"], torch.Generator().manual_seed(0)
    for path in (tmp_path / "o" / "parts").glob("*-*"):
        own = load_file(path)
        moved = base + 1e-3 * torch.randn(base.shape, generator=g)
        if path.stem == "feature-3":
            moved = moved + red
        if path.stem == "feature-5":
            moved = moved + red * torch.tensor([1.0, -1.0] * 3)[:, None]
        save_file({**own, "embedding": moved.contiguous()}, path)
    main(command(made, tmp_path / "o"))
    said = json.loads((tmp_path / "o" / "attributes.json").read_text())
    assert [a["word"] for a in said["latents"]["3"]] == ["red"] and said["latents"]["3"][0]["choice"]["low"] == 1
    assert [a["word"] for a in said["latents"]["5"]] == ["red"] and said["latents"]["5"][0]["choice"]["mean"] == 0
    rates = said["rates"]
    assert (rates["features"]["words"], rates["features"]["confirmed"], rates["features"]["asked"]) == (2, 1, 2)
    assert rates["directions"]["confirmed"] == 0 and rates["directions"]["asked"] == 2
    page = (tmp_path / "o" / "report.html").read_text()
    assert "1 of 2" in page and page.count("<img") == 8  # two features with words, two pairs of images each


def test_a_killed_run_goes_on_with_what_is_drawn(made, done, tmp_path, monkeypatch):
    from mmsae.interpret.attributes.job import AttributeJob

    real, calls = AttributeJob._part, []

    def dies(self, *args):
        calls.append(args[0])
        if len(calls) == 4:
            raise RuntimeError("stopped")
        return real(self, *args)

    monkeypatch.setattr(AttributeJob, "_part", dies)
    with pytest.raises(RuntimeError, match="stopped"):
        main(command(made, tmp_path / "o"))
    assert not (tmp_path / "o" / "attributes.json").exists() and len(list((tmp_path / "o/parts").iterdir())) == 3
    main(command(made, tmp_path / "o"))
    assert len(calls) == 10
    for name in ("attributes.json", "parts/feature-5.safetensors", "parts/direction-1.safetensors"):
        assert (tmp_path / "o" / name).read_bytes() == (done / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--features", "48"], "feature 48 is asked about, and the SAE has 48"),
        (["--random", "1"], "random is 1; it must be at least 2"),
        (["--random", "60"], "60 to compare with are asked for"),
        (["--rates", "0.5", "0.1"], "rates [0.5, 0.1] are not a least and a largest share"),
        (["--strength", "0"], "strength is 0.0"),
        (["--vocabulary", "nowhere.txt"], "vocabulary nowhere.txt is no file"),
    ],
)
def test_what_is_refused_is_one_sentence_and_leaves_nothing(made, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as e:
        main(command(made, tmp_path / "o", *more))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and says in said and not (tmp_path / "o").exists()


def test_too_few_prompts_or_words_and_a_judge_without_texts(made, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("red\nblue\n")
    images = f"module:{__name__}:images_alone"
    for args, says in (
        (command(made, tmp_path / "o", prompts=PROMPTS[:3]), "3 different prompts are given"),
        (command(made, tmp_path / "o", "--vocabulary", str(tmp_path / "two.txt")), "has 2 phrases"),
        (command(made, tmp_path / "o", "--judge", f"diffusers:{made / 'pipeline'}"), "a judge needs embeddings"),
        (command(made, tmp_path / "o", "--judge", images), "embeds no texts"),
    ):
        with pytest.raises(SystemExit) as e:
            main(args)
        assert e.value.code == 2 and says in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "o").exists()

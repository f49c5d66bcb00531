"""Evidence of several SAEs in one pass of their host: every folder has the bytes of a run of its own."""

import pytest

from mmsae.cli import main
from mmsae.interpret.evidence import job as job_module
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.interpret.evidence.parts import CodesPart
from mmsae.interpret.evidence.reader import EvidenceReader
from mmsae.jobs.folder import JobFolder
from mmsae.jobs.status import job_status
from mmsae.options import SAERun
from mmsae.sae import SAE, random_control
from mmsae.types import InputError
from tests.helpers.evaluation import save_host, save_sae, write_colours
from tests.helpers.filtering import tree

RUN = SAERun(device="cpu", workers=0, batch_size=16, progress=False)
SEE = {"n_top": 5, "quantiles": 3, "each": 2, "negatives": 4, "min_items": 6, "candidates": 60}
CHOICE = Evidencing(**SEE)
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, three SAEs of the same sites (one of random weights, one of another size), and what each alone gives."""
    root = tmp_path_factory.mktemp("several")
    host, shards = save_host(root / "host"), write_colours(root / "shards", 75, seed=3, per_shard=30)
    pairs = {"site": "image.embed", "modalities": ("image", "text")}
    save_sae(root / "a", host, d_sae=40, **pairs)
    random_control(SAE.from_pretrained(root / "a"), 5).save_pretrained(root / "b")
    save_sae(root / "c", host, d_sae=24, **pairs)
    for name in NAMES:
        collect_evidence(str(root / name), shards, root / f"of_{name}", choice=CHOICE, run=RUN)
    alone = {name: tree(root / f"of_{name}") for name in NAMES}
    assert alone["a"] != alone["b"] and len(alone["a"]) > 8
    return root, shards, alone


def together(root, shards, out, names=NAMES, choice=CHOICE, **more):
    saes, outs = [str(root / n) for n in names], [out / n for n in names]
    return collect_evidence(saes, shards, outs, choice=choice, run=RUN, **more)


def same(out, alone, names=NAMES):
    for name in names:
        assert tree(out / name) == alone[name], name
    assert sorted(p.name for p in out.iterdir()) == sorted(names)  # no work is left


def counted(monkeypatch, kind, method):
    calls, real = [], getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *args: calls.append(args) or real(self, *args))
    return calls


def test_each_folder_is_that_of_a_run_of_its_own_and_the_host_reads_once(made, tmp_path, monkeypatch, capsys):
    root, shards, alone = made
    reads = counted(monkeypatch, EvidenceReader, "_read")
    collect_evidence(str(root / "a"), shards, tmp_path / "x", choice=CHOICE, run=RUN)
    once = len(reads)
    given = ["--sae", *(str(root / n) for n in NAMES), "--out", *(str(tmp_path / "o" / n) for n in NAMES)]
    more = [a for k, v in SEE.items() for a in (f"--{k.replace('_', '-')}", str(v))]
    main(["evidence", *given, "--shards", shards, "--device", "cpu", "--workers", "0", "--batch-size", "16",
          "--progress", "false", *more])  # fmt: skip
    assert len(reads) == 2 * once and once >= 5
    same(tmp_path / "o", alone)
    assert capsys.readouterr().out.split() == [str(tmp_path / "o" / n) for n in NAMES]


def test_a_second_pass_gives_the_same_bytes(made, tmp_path, monkeypatch):
    root, shards, alone = made
    asked = counted(monkeypatch, job_module.EvidenceTar, "finish")
    together(root, shards, tmp_path, choice=Evidencing(**SEE, keep_gb=0.0))
    assert len(asked) == 6  # three tars, twice
    same(tmp_path, alone)


@pytest.mark.parametrize("done", [1, 5])
def test_killed_at_any_part_it_goes_on_without_doing_one_again(made, tmp_path, monkeypatch, done):
    root, shards, alone = made
    real = CodesPart.finish

    def killed(self, faults):
        if len(written) == done:
            raise KeyboardInterrupt
        written.append(self)
        real(self, faults)

    written = []
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(CodesPart, "finish", killed)
        together(root, shards, tmp_path)
    assert len(list(tmp_path.glob("*.partial/codes/0*.safetensors"))) == done
    again = counted(monkeypatch, CodesPart, "finish")
    together(root, shards, tmp_path)
    assert len(again) == 9 - done
    same(tmp_path, alone)


def test_killed_when_one_folder_is_there_it_goes_on_with_the_others(made, tmp_path, monkeypatch):
    root, shards, alone = made
    real = JobFolder.publish

    def killed(self):
        if self.out.name == "b":
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(JobFolder, "publish", killed)
        together(root, shards, tmp_path)
    assert (tmp_path / "a").is_dir() and not (tmp_path / "b").exists()
    monkeypatch.setattr(CodesPart, "finish", lambda *a: pytest.fail("all tars were done"))
    together(root, shards, tmp_path)
    same(tmp_path, alone)


def test_what_was_begun_alone_goes_on_together_and_the_other_way_round(made, tmp_path, monkeypatch):
    root, shards, alone = made

    def killed_after(n):
        real, written = CodesPart.finish, []

        def finish(self, faults):
            if len(written) == n:
                raise KeyboardInterrupt
            written.append(self)
            real(self, faults)

        return finish

    collect_evidence(str(root / "a"), shards, tmp_path / "a", choice=CHOICE, run=RUN)
    for names, n in ((("b",), 1), (("b", "c"), 2)):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(CodesPart, "finish", killed_after(n))
            together(root, shards, tmp_path, names)
    assert [len(list((tmp_path / f"{n}.partial" / "codes").glob("0*.safetensors"))) for n in "bc"] == [2, 1]
    again = counted(monkeypatch, CodesPart, "finish")
    together(root, shards, tmp_path)
    assert len(again) == 3  # one of b, two of c
    same(tmp_path, alone)


def test_parts_of_a_queue_do_all_saes(made, tmp_path):
    root, shards, alone = made
    twice = Evidencing(**SEE, keep_gb=0.0)
    for _ in range(2):  # items in evidence are known after the first merge
        for part in ("2/2", "1/2"):
            assert together(root, shards, tmp_path, choice=twice, part=part) is None
        assert {p.units - p.done for n in NAMES for p in job_status(tmp_path / n).passes} == {0}
        together(root, shards, tmp_path, choice=twice, merge=True)
    same(tmp_path, alone)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(made, tmp_path):
    root, shards, alone = made
    together(root, shards, tmp_path, devices=2)
    same(tmp_path, alone)


def test_saes_that_do_not_go_together_are_refused(made, tmp_path):
    root, shards, _ = made
    saes = [str(root / n) for n in "ab"]
    with pytest.raises(InputError, match="sae names 2 SAEs and out 1 folders"):
        collect_evidence(saes, shards, str(tmp_path / "o"), choice=CHOICE, run=RUN)
    with pytest.raises(InputError, match="out names one folder twice"):
        collect_evidence(saes, shards, [tmp_path / "o", str(tmp_path / "o")], choice=CHOICE, run=RUN)
    patches = save_sae(
        tmp_path / "patches", f"local-dir:{root / 'host'}", site="visual.transformer.resblocks.1:out[patches]"
    )
    with pytest.raises(
        InputError, match=r"SAE .*patches reads image at .*\[patches\], and .*/a image at image.embed.* the same"
    ):
        collect_evidence([saes[0], patches], shards, [tmp_path / "o", tmp_path / "p"], choice=CHOICE, run=RUN)
    assert {p.name for p in tmp_path.iterdir()} == {"patches"}

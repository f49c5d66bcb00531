import json
import shutil

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.interop import LIBRARIES, load
from mmsae.interop.detect import module
from tests.helpers.foreign import rows, some_sae


@pytest.fixture
def folders(tmp_path):
    """One folder of every library that mmsae writes plain SAEs for."""
    made = {name: some_sae("topk") for name in ("saelens", "dictionary_learning", "sparsify", "visaebench")}
    made["saev"] = some_sae("relu")
    for name, sae in made.items():
        module(name).write(sae, tmp_path / name)
    return {name: (tmp_path / name, sae) for name, sae in made.items()}


def test_each_library_recognises_its_own_and_no_other(folders):
    for name, (folder, sae) in folders.items():
        assert [n for n in LIBRARIES if module(n).recognise(folder)] == [name]
        assert torch.equal(load(folder).encode(rows()).to_dense() != 0, sae.encode(rows()).to_dense() != 0)


def test_every_library_has_the_three_functions_and_writes_or_says_why_not(tmp_path):
    for name in LIBRARIES:
        found = module(name)
        assert found.recognise(tmp_path) is False and callable(found.read)
        try:
            assert found.write(some_sae("jumprelu"), tmp_path / name).is_dir()
        except InputError as e:
            assert len(str(e)) > 20


def test_a_file_of_weights_is_read_with_what_lies_beside_it(folders):
    folder, _ = folders["dictionary_learning"]
    assert torch.equal(load(folder / "ae.pt").encode(rows()).to_dense(), load(folder).encode(rows()).to_dense())


def test_an_sae_folder_and_a_subfolder(folders, tmp_path):
    sae = some_sae("topk")
    sae.save_pretrained(tmp_path / "own")
    assert torch.equal(load(tmp_path, subfolder="own").encode(rows()).to_dense(), sae.encode(rows()).to_dense())
    with pytest.raises(InputError, match="no missing in"):
        load(tmp_path, subfolder="missing")


def test_hints_that_a_library_does_not_take_are_refused(folders):
    with pytest.raises(InputError, match=r"is of sparsify, which takes no k \(but modality\)"):
        load(folders["sparsify"][0], k=3)
    assert load(folders["sparsify"][0], k=None, modality="text").modalities == ("text",)


def test_what_no_library_wrote_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no library that mmsae reads wrote .*\(\['config.json'\]\)"):
        load(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"no library that mmsae reads wrote .*x.pt"):
        load(tmp_path / "x.pt")
    for nowhere, why in (("no/such/place", "expected a folder"), ("x.pth", "no checkpoint file at x.pth")):
        with pytest.raises(InputError, match=why):
            load(nowhere)


def test_a_foreign_folder_is_refused_as_an_sae_by_its_librarys_name(folders):
    for name, (folder, _) in folders.items():
        with pytest.raises(InputError, match=rf"a checkpoint of {name}: mmsae convert \S+{name} DST makes"):
            SAE.from_pretrained(folder)
    with pytest.raises(InputError, match="a checkpoint of saev: mmsae convert"):
        SAE.from_pretrained(folders["saev"][0] / "sae.pt")


class Hub:
    """A repository of the hub that is a folder here; it gives what the patterns ask for, as huggingface_hub does."""

    def __init__(self, repository, tmp_path, monkeypatch):
        self.repository, self.cache, self.calls = repository, tmp_path / "cache", []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)

    def list_repo_files(self, repo, revision=None):
        return [p.relative_to(self.repository).as_posix() for p in self.repository.rglob("*") if p.is_file()]

    def download(self, repo, revision=None, allow_patterns=None, ignore_patterns=None):
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append((repo, revision))
        files = filter_repo_objects(
            self.list_repo_files(repo), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in files:
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / file, self.cache / file)
        return str(self.cache)

    def downloaded(self):
        return sorted(p.relative_to(self.cache).as_posix() for p in self.cache.rglob("*") if p.is_file())


def test_a_subfolder_of_the_hub_is_downloaded_without_what_lies_beside_it(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    for name, kind in (("a", "topk"), ("b", "jumprelu")):
        module("visaebench").write(some_sae(kind), repository / name)
    shutil.copytree(repository / "b", repository / "a" / "deeper")
    hub = Hub(repository, tmp_path, monkeypatch)
    sae = load("someone/saes", subfolder="a", revision="v1")
    assert hub.calls == [("someone/saes", "v1")] and hub.downloaded() == ["a/config.json", "a/sae.pt"]
    assert torch.equal(sae.encode(rows()).to_dense(), load(repository / "a").encode(rows()).to_dense())


def test_the_main_folder_or_one_file_of_the_hub(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    module("saev").write(some_sae("relu"), repository)
    shutil.copytree(repository, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", repository / "layer")
    hub = Hub(repository, tmp_path, monkeypatch)
    assert load("someone/saes").d_sae == 48 and hub.downloaded() == ["sae.pt"]
    assert load("someone/saes", subfolder="layer/sae.pt").d_sae == 48
    assert hub.downloaded() == ["layer/sae.pt", "sae.pt"]


def test_folders_of_a_repository_are_named_where_none_was_chosen(tmp_path, monkeypatch):
    for name in ("a", "b"):
        module("visaebench").write(some_sae("topk"), tmp_path / "repository" / name)
    Hub(tmp_path / "repository", tmp_path, monkeypatch)
    with pytest.raises(InputError, match="has no SAE in its main folder; subfolder may be one of a, b"):
        load("someone/saes")
    with pytest.raises(InputError, match="has no SAE in c; subfolder may be one of a, b"):
        load("someone/saes", subfolder="c")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def away(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    with pytest.raises(
        InputError,
        match="it is not here, and hf://someone/saes: the connection to the hub failed",
    ):
        load("someone/saes")


def test_nothing_but_tensors_is_unpickled(folders, tmp_path):
    folder = folders["visaebench"][0]
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.touch, ())

    torch.save({"encoder.weight": Evil()}, folder / "sae.pt")
    with pytest.raises(InputError, match="cannot be read as a file of tensors"):
        load(folder)
    assert not marker.exists()


def test_a_configuration_that_is_no_object_is_no_mark(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps([1]))
    (tmp_path / "sae.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no library that mmsae reads wrote"):
        load(tmp_path)

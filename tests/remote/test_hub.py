"""Places on the hub by name, what lies there brought and written, and one sentence where something is wrong."""

import time

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from mmsae.errors import InputError
from mmsae.remote.hub import HubPlace, brought, files_of, hub_place, or_cache, send
from tests.helpers import hub as fake


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake.serving() as server:
        fake.used_by(server, monkeypatch, tmp_path / "hub")
        server.repositories["models/me/saes"] = fake.Repository(
            {"cfg.json": b"{}", "a/cfg.json": b"{1}", "a/b/x.json": b""}
        )
        yield server


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("me/sae", HubPlace("me/sae")),
        ("me/sae@v1", HubPlace("me/sae", "v1")),
        ("me/sae@v1/a/b", HubPlace("me/sae", "v1", "a/b")),
        ("me/sae@refs/pr/3/a", HubPlace("me/sae", "refs/pr/3", "a")),
        ("me/sae@feature%2Fx", HubPlace("me/sae", "feature/x")),
        ("hf://me/sae", HubPlace("me/sae")),
        ("hf://me/sae/a/b/", HubPlace("me/sae", "", "a/b")),
        ("hf://me/sae@v1/a", HubPlace("me/sae", "v1", "a")),
        ("runs/paired/sae", None), ("./me/sae", None), ("/me/sae", None), ("~/sae", None), ("sae", None),
        ("hf://datasets/me/shards", None), ("s3://bucket/sae", None), ("me/no such name", None),
    ],
)  # fmt: skip
def test_names_of_places(text, place):
    assert hub_place(text) == place
    if place is not None and "%" not in text:
        assert hub_place(str(place)) == place


def test_revision_and_folder_are_named_once():
    assert hub_place("me/sae", "v1", "/a/") == HubPlace("me/sae", "v1", "a")
    with pytest.raises(InputError, match="me/sae@v1 names a revision, and so does revision"):
        hub_place("me/sae@v1", "v2")
    with pytest.raises(InputError, match="names a folder, and so does subfolder"):
        hub_place("hf://me/sae/a", subfolder="b")


def test_what_lies_below_is_not_brought(hub):
    found = brought(HubPlace("me/saes", "", "a"), ["*.json"])
    assert [p.name for p in found.iterdir()] == ["cfg.json"] and (found / "cfg.json").read_text() == "{1}"
    assert files_of(HubPlace("me/saes", "", "a")) == ["a/b/x.json", "a/cfg.json", "cfg.json"]


def test_written_in_one_commit_and_read_again(hub, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(bytes(2000))
    place = HubPlace("me/new", "v2", "deep/er")
    url = send({"w.safetensors": tmp_path / "w.safetensors", "cfg.json": b"{}"}, place, message="First")
    there = hub.repositories["models/me/new"]
    assert url == f"{hub.url}/me/new" and there.messages == ["initial commit", "First"] and not there.private
    assert there.files("v2") == {"deep/er/w.safetensors": bytes(2000), "deep/er/cfg.json": b"{}"}
    assert there.files("main") == {} and len(hub.objects) == 1
    send({"cfg.json": b"{2}"}, place, stale=["w.safetensors", "results.json"])
    assert there.files("v2") == {"deep/er/cfg.json": b"{2}"}
    assert (brought(place, ["*"]) / "cfg.json").read_text() == "{2}"


def test_private_stays_private(hub):
    send({"cfg.json": b"{}"}, HubPlace("me/own"), private=True)
    assert hub.repositories["models/me/own"].private
    with pytest.raises(InputError, match="me/saes is there already and public: make it private on the hub"):
        send({"cfg.json": b"secret"}, HubPlace("me/saes"), private=True)
    assert hub.repositories["models/me/saes"].files()["cfg.json"] == b"{}"


def test_what_is_wrong_is_said_in_one_sentence_without_the_token(hub, tmp_path, monkeypatch):
    def refused(work, *args, **options):
        with pytest.raises(InputError) as e:
            work(*args, **options)
        assert fake.TOKEN not in str(e.value) and "\n" not in str(e.value)
        return str(e.value)

    any_file = ["*.json"]
    assert "me/nothing is not on the hub, or is private and not to be seen" in refused(
        brought, HubPlace("me/nothing"), any_file
    )
    assert "has no revision 'v9'; it has main" in refused(brought, HubPlace("me/saes", "v9"), any_file)
    assert "you/x: the hub refuses this (403; the token that is set does not allow it)" in refused(
        send, {"a": b""}, HubPlace("you/x")
    )
    hub.repositories["models/you/gated"] = fake.Repository()
    hub.repositories["models/you/gated"].gated = True
    assert "you/gated is gated: ask for access on its page" in refused(brought, HubPlace("you/gated"), any_file)
    monkeypatch.setenv("HF_TOKEN", "")
    assert "hf://me/x: the hub refuses this (401; no token is set: hf auth login, or HF_TOKEN)" in refused(
        send, {"a": b""}, HubPlace("me/x")
    )
    assert "not to be seen from here (no token is set" in refused(brought, HubPlace("me/nothing"), any_file)
    assert "is no name of a repository" in refused(brought, HubPlace("me/two--dashes"), any_file)
    hub.down = True
    said = refused(brought, HubPlace("me/saes"), any_file)
    assert "hf://me/saes: the " in said and "run the same command again" in said


def test_a_card_that_the_hub_refuses_makes_no_repository(hub):
    with pytest.raises(InputError, match=r'first block of README.md: .*"license" must be one of the list, not beer'):
        send({"README.md": b"---\nlicense: beer\n---\n"}, HubPlace("me/late"))
    assert "models/me/late" not in hub.repositories


def test_a_hub_that_cannot_be_reached_is_asked_twice_and_not_file_by_file(hub, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with or_cache() as why:
        assert why == "" and not constants.HF_HUB_OFFLINE
    kept = hf_hub_download("me/saes", "cfg.json")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with or_cache() as why:
        assert why == "ConnectError" and constants.HF_HUB_OFFLINE
        assert hf_hub_download("me/saes", "cfg.json") == kept
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download("me/saes", "a/cfg.json")
    assert not constants.HF_HUB_OFFLINE and sum(waits) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with or_cache() as why:
        assert why == "" and constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE and sum(waits) == 1

import numpy as np
import pytest
import torch

from mmsae.activations import ActivationStore, extract, writer
from mmsae.shards import ShardWriter
from mmsae.types import InputError
from tests.helpers.stores import FakeHost, contents, image_bytes

QUIET = {"workers": 0, "progress": False, "batch_size": 4}
SITES = ["image.block[all]", "image.embed", "text.embed"]
# uids by shard: 3 comes again within a shard and in the next, all of the third were there, 9 is new
UIDS = [[1, 2, 3, 3, 4], [5, 3, 6, 1, 7], [4, 5], [9, 7]]


def shards(folder, keep=lambda uid, seen: True, own=False):
    seen, n = set(), 0
    for t, uids in enumerate(UIDS):
        with ShardWriter(folder, f"s{t}", per_shard=10) as w:
            for uid in uids:
                if keep(uid, seen):
                    fields = {
                        "png": image_bytes(n),
                        "txt": f"picture {n}",
                        "json": {"uid": f"{100 + n if own else uid:032x}"},
                    }
                    w.write(f"{n:03d}", fields)
                seen.add(uid)
                n += 1
    return str(folder)


def test_the_first_in_the_order_of_the_shards_stays(tmp_path):
    twice = shards(tmp_path / "twice")
    with pytest.raises(InputError, match="occurs twice"):
        extract(FakeHost(), twice, tmp_path / "refused", sites=SITES, **QUIET)
    out = extract(FakeHost(), twice, tmp_path / "out", sites=SITES, duplicates="drop", **QUIET)
    found = ActivationStore(out)
    assert [int(u, 16) for u in found.uids] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert found.keys == ["000", "001", "002", "004", "005", "007", "009", "012"]
    assert found.spec.faults["counts"] == {"duplicate": 6} and found.spec.faults["seen"] == 14
    listed = [e[1:] for e in found.spec.faults["examples"]]
    assert [e[1] for e in listed] == ["003", "006", "008", "010", "011", "013"]
    assert listed[1] == ["s1-000000.tar", "006", f"uid {3:032x} is in s0-000000.tar already"]
    apart = ActivationStore(
        extract(FakeHost(), shards(tmp_path / "apart", own=True), tmp_path / "a", sites=SITES, **QUIET)
    )
    assert len(apart.keys) == 14
    for name in found.spec.sites:  # each row is that of its sample
        for item, key in enumerate(found.keys):
            places = zip((found, apart), (item, apart.keys.index(key)), strict=True)
            ours, theirs = (s.load(name)[s.rows_of_items(name, np.array([i]))] for s, i in places)
            assert len(ours) and torch.equal(ours, theirs)


def test_workers_and_kills_change_no_byte(tmp_path, monkeypatch):
    twice = shards(tmp_path / "twice")
    options = {"sites": SITES, "duplicates": "drop", **QUIET}
    whole = extract(FakeHost(), twice, tmp_path / "whole", **options)
    assert contents(extract(FakeHost(), twice, tmp_path / "two", **options | {"workers": 2})) == contents(whole)
    real, calls = writer.PartWriter.commit, []

    def killed(self):
        calls.append(self.source)
        if len(calls) == 6:  # four parts, then the second that is written anew
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(writer.PartWriter, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(FakeHost(), twice, tmp_path / "killed", **options)
    assert contents(extract(FakeHost(), twice, tmp_path / "killed", **options)) == contents(whole)


def test_a_job_that_was_refused_goes_on_with_drop(tmp_path):
    twice = shards(tmp_path / "twice")
    with pytest.raises(InputError, match="occurs twice"):
        extract(FakeHost(), f"{twice}/s{{0,1}}-*.tar", tmp_path / "out", **QUIET)
    out = extract(FakeHost(), f"{twice}/s{{0,1}}-*.tar", tmp_path / "out", duplicates="drop", **QUIET)
    assert len(ActivationStore(out).uids) == 7


def test_without_duplicates_nothing_changes(tmp_path):
    once = shards(tmp_path / "once", lambda uid, seen: uid not in seen)
    plain = extract(FakeHost(), once, tmp_path / "plain", fault_limit=0, **QUIET)
    assert contents(extract(FakeHost(), once, tmp_path / "drop", duplicates="drop", **QUIET)) == contents(plain)

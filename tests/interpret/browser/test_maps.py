import numpy as np
import pytest

from mmsae.interpret.browser.options import Display
from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.browser import browser, read


@pytest.fixture(scope="module", params=[16, 2])
def made(request, tmp_path_factory):
    folder, z = browser(tmp_path_factory.mktemp("run"), display=Display(maps=request.param))
    return folder, z, request.param


def test_the_strongest_latents_of_a_sample_have_their_maps(made):
    folder, z, most = made
    uids = read(folder, "main/samples")["uid"]
    assert read(folder, "main/meta")["maps"] == most
    for pack in range(-(-len(uids) // 32)):
        record = read(folder, f"main/maps/{pack}")
        for m, codes in z.items():
            start, maps = record[m]["start"], record[m]
            at = np.concatenate([[0], np.cumsum(maps["size"], dtype=int)])
            largest = np.maximum(codes.max((0, 1)), 1e-9)
            for i, uid in enumerate(uids[32 * pack : 32 * (pack + 1)]):
                own = codes[int(uid, 16)]
                share = own.max(0) / largest
                found = maps["latent"][start[i] : start[i + 1]]
                assert set(found) == {j for j in np.argsort(-share)[:most] if share[j] > 0}
                for k in range(start[i], start[i + 1]):
                    j, part = maps["latent"][k], slice(at[k], at[k + 1])
                    again = np.zeros(len(own))
                    again[maps["position"][part]] = maps["value"][part] / 255 * maps["upper"][k]
                    assert np.isclose(maps["upper"][k], own[:, j].max())
                    assert np.abs(again - own[:, j]).max() <= maps["upper"][k] / 255


def test_without_places_or_on_request_there_are_none(tmp_path):
    from mmsae.interpret.browser.command import explore
    from tests.helpers.evidence import write_evidence

    folder, _ = browser(tmp_path / "a", display=Display(maps=0))
    assert read(folder, "main/meta")["maps"] == 0 and not (folder / "data" / "main" / "maps").exists()
    z = np.eye(5)[np.arange(20) % 5][:, None]
    write_evidence(tmp_path / "e", {"image": z, "text": z}, captions=["a dog"] * 20)
    explore(str(tmp_path / "e"), out=str(tmp_path / "b"), progress=False)
    assert read(tmp_path / "b", "main/meta")["maps"] == 0 and not (tmp_path / "b/data/main/maps").exists()


def test_labels_of_latents_and_samples_are_searched_by(made):
    folder, _, _ = made
    meta, names, samples = (read(folder, f"main/{k}") for k in ("meta", "names", "samples"))
    for j in range(12):  # they fire on items of one class
        assert [meta["labels"][k] for k in names["labels"][j] if k != 65535] == [f"class {j}"]
    assert (names["labels"][22:] == 65535).all()
    said = [meta["labels"][k] for k in samples["label"]]
    assert said == [f"class {int(u, 16) % 12}" for u in samples["uid"]] and len(samples["key"]) == len(said)


def test_maps_take_no_more_than_they_may(tmp_path, capsys):
    """First samples have maps of fewer latents, then examples only of the places where their latent is strongest."""
    from benchmarks.browser import meta_of, write_large
    from mmsae.interpret.browser.command import explore

    write_large(tmp_path / "e", 400, 500, patches=16, fill=0.3)
    sizes, evidence = [], Evidence(tmp_path / "e")
    for megabytes in (150, 3.5, 0.5):
        display = Display(layout="none", vocabulary="captions", map_megabytes=megabytes)
        explore(str(tmp_path / "e"), out=str(tmp_path / "b"), display=display)
        meta, said = meta_of(tmp_path / "b"), capsys.readouterr().out
        sizes.append(meta["bytes"]["maps"])
        heat = read(tmp_path / "b", "main/latents/0")["image"]["heat"]
        if megabytes == 150:
            assert meta["maps"] == 16 and "--map-megabytes" not in said and heat["size"].max() > 200
            continue
        assert 0.5e6 * megabytes < sizes[-1] < 1.1e6 * megabytes < sizes[0] and meta["maps"] < 16
        assert f"of the {meta['maps']} strongest latents of a sample, not 16" in said
        most = heat["size"].max()
        assert (most < 100) == ("strongest places of an example" in said) == (megabytes == 0.5)
    item, shown = read(tmp_path / "b", "main/latents/0")["image"]["item"], read(tmp_path / "b", "main/samples")["uid"]
    at = np.concatenate([[0], np.cumsum(heat["size"], dtype=int)])
    for pair in np.flatnonzero(heat["size"] == most)[:20]:
        j, k = divmod(int(pair), item.shape[1])
        own = evidence.heat(int(shown[item[j, k]], 16), j).ravel()
        kept = heat["position"][at[pair] : at[pair + 1]]
        assert len(kept) == most and own[kept].min() >= np.delete(own, kept).max()
    assert meta["maps"] == 0 or sizes[-1] > 0

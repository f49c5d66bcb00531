import numpy as np
import pytest

from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.browser import browser, read


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, z = browser(tmp_path_factory.mktemp("run"))
    return folder, z, Evidence(folder.parent / "evidence")


def test_the_table_has_what_the_evidence_counts(made):
    folder, z, _ = made
    table = read(folder, "main/table")
    for m, codes in z.items():
        on = (codes != 0).any(1)
        assert (table[f"{m}.n"] == on.sum(0)).all()
        assert np.allclose(table[f"{m}.density"], on.mean(0))
        assert np.allclose(table[f"{m}.max"], codes.max((0, 1)))
        assert np.allclose(table[f"{m}.mean"], codes.sum((0, 1)) / np.maximum((codes != 0).sum((0, 1)), 1))
    assert (table["agree"][:12] > 0.9).all() and np.isnan(table["agree"][12:]).all()
    assert (table["modality"][12:18] == 1).all() and (table["modality"][18:22] == 0).all()
    assert np.isnan(table["modality"][22:]).all()


def test_examples_values_and_maps_are_those_of_the_evidence(made):
    folder, z, evidence = made
    shown = np.array([int(u, 16) for u in read(folder, "main/samples")["uid"]])  # the writer's uid is the place
    record = read(folder, "main/latents/0")
    for m, codes in z.items():
        item, value, heat = record[m]["item"], record[m]["value"], record[m]["heat"]
        start = np.concatenate([[0], np.cumsum(heat["size"].ravel(), dtype=int)])
        top = evidence.top(m)
        for j in range(24):
            found = [shown[e] for e in item[j] if e != 65535]
            best = [i for i in top.item[j] if i >= 0]
            assert found[: len(best)] == best
            upper = 0.0
            for k, e in enumerate(item[j]):
                if e == 65535:
                    continue
                own = codes[shown[e], :, j]
                assert abs(value[j, k] / 32767 * codes[..., j].max() - own.max()) < 1e-3
                pair = j * item.shape[1] + k
                at = slice(start[pair], start[pair + 1])
                assert (heat["position"][at] == np.flatnonzero(own)).all()
                assert np.abs(heat["value"][at] / 255 * heat["upper"][j] - own[own > 0]).max() <= heat["upper"][j] / 255
                upper = max(upper, own.max())
            assert np.isclose(heat["upper"][j], upper)


def test_lists_hold_all_shown_items_with_their_percentiles(made):
    folder, z, _ = made
    shown = np.array([int(u, 16) for u in read(folder, "main/samples")["uid"]])
    lists = read(folder, "main/lists/0")
    for m, codes in z.items():
        pooled, at = codes.max(1), lists[m]["start"]
        for j in range(24):
            items, rank = (lists[m][k][at[j] : at[j + 1]] for k in ("item", "rank"))
            assert set(shown[items]) == set(np.flatnonzero(pooled[:, j])) & set(shown)
            among = np.sort(pooled[pooled[:, j] > 0, j])
            assert np.array_equal(rank, np.searchsorted(among, pooled[shown[items], j], "right"))
            assert lists[m]["n"][j] == len(among)


def test_samples_have_their_texts_images_and_codes(made):
    folder, z, evidence = made
    pack = read(folder, "main/items/0")
    for k, uid in enumerate(pack["uid"]):
        i = int(uid, 16)
        assert pack["caption"][k] == evidence.items.caption[i] and pack["picture"][k].startswith(
            "data:image/webp;base64,"
        )
        for m, codes in z.items():
            at = slice(*pack[m]["start"][k : k + 2])
            own = codes[i].max(0)
            assert (pack[m]["latent"][at] == np.flatnonzero(own)).all()
            assert np.allclose(pack[m]["value"][at] / 127 * codes.max((0, 1))[own > 0], own[own > 0], atol=0.02)


def test_words_of_captions_stand_out(made):
    folder, _, _ = made
    words = read(folder, "main/latents/0")["words"]
    assert [words[j][0][0] for j in range(6, 12)] == [f"word{j}" for j in range(6, 12)]
    assert words[22] == words[23] == []


def test_codes_are_cut_to_the_strongest_of_each_item(tmp_path):
    from mmsae.interpret.browser.options import Display

    folder, z = browser(tmp_path, display=Display(codes=2))
    pack = read(folder, "main/items/0")
    most = z["image"].max((0, 1))
    for k, uid in enumerate(pack["uid"]):
        own = z["image"][int(uid, 16)].max(0) / np.maximum(most, 1e-9)
        at = slice(*pack["image"]["start"][k : k + 2])
        assert set(pack["image"]["latent"][at]) == {j for j in np.argsort(-own)[:2] if own[j] > 0}


@pytest.mark.parametrize(("captions", "images"), [(False, True), (True, False), (False, False)])
def test_evidence_without_captions_or_images(tmp_path, captions, images):
    from mmsae.interpret.browser.command import explore
    from tests.helpers.browser import planted

    planted(tmp_path / "evidence", captions=captions, images=images)
    explore(str(tmp_path / "evidence"), progress=False)
    pack = read(tmp_path / "browser", "main/items/0")
    assert ("picture" in pack) == images and any(pack["caption"]) == captions
    assert read(tmp_path / "browser", "main/meta")["images"] == images

"""Loaders in step: each gives what it gives for itself, its epochs too, also from the middle on."""

import pytest
import torch

from mmsae.activations import ActivationStore, SideBySideLoader, StoreLoader, write_store
from mmsae.types import InputError, Site


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """100 items, with one row at one site and three at the other."""
    sites = {
        "image/a": Site("h" * 32, "a", tokens="cls", width=4),
        "image/b": Site("h" * 32, "b", tokens="all", width=3),
    }
    x = {"image/a": torch.randn(100, 4), "image/b": torch.randn(300, 3)}
    items = {"image/a": torch.arange(100), "image/b": torch.arange(300) // 3}
    folder = tmp_path_factory.mktemp("store") / "s"
    return ActivationStore(write_store(folder, x, sites=sites, items=items, rows_per_shard=40))


def loader(store, site, **kw):
    return StoreLoader(store, 10, sites={"image": site}, **kw)


def together(store, **kw):
    return SideBySideLoader({site: loader(store, site, **kw) for site in ("a", "b")})


def rows(batches, site):
    return [b.of[site].x["image"] for b in batches if site in b.of]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_the_short_epochs_go_on_in_the_long_ones(store):
    both = together(store)
    found = [batch for _ in range(2) for batch in both]
    assert len(both) == 30 and len(found) == 60
    for site, epochs in (("a", 6), ("b", 2)):
        alone = loader(store, site)
        assert equal(rows(found, site), [t.x["image"] for _ in range(epochs) for t in alone])


@pytest.mark.parametrize("at", [4, 10, 13, 30, 37])
def test_it_goes_on_where_a_state_was_taken(store, at):
    both, left = together(store), at
    while left:
        for _ in both:
            left -= 1
            if not left:
                state = both.state_dict()
                break
    again = together(store)
    again.load_state_dict(state)
    whole = together(store)
    expected = [batch for _ in range(3) for batch in whole][at:]
    found = [batch for _ in range(2) for batch in again]
    for site in ("a", "b"):
        assert equal(rows(found, site)[:20], rows(expected, site)[:20])


def test_a_validation_has_every_row_once(store):
    found = list(together(store, shuffle=False))
    for site, n in (("a", 10), ("b", 30)):
        assert equal(rows(found, site), [t.x["image"] for t in loader(store, site, shuffle=False)])
        assert sum(site in b.of for b in found) == n


def test_a_state_of_other_sites_is_refused(store):
    one = SideBySideLoader({"a": loader(store, "a")})
    with pytest.raises(InputError, match="made at the sites a and b, this run reads a; resuming would not continue"):
        one.load_state_dict(together(store).state_dict())
    with pytest.raises(InputError, match="made at the sites of one SAE, this run reads a"):
        one.load_state_dict(loader(store, "a").state_dict())

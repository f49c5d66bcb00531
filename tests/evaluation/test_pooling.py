"""Sums over the rows of images against the naive figures, pooled codes, batches as one."""

import torch

from mmsae.evaluation.pooling import Sums, Through, TokenMeans, mean_rows, pool_codes
from mmsae.metrics.reconstruction import fvu
from mmsae.types import Codes


def some(n=50, d=6, images=7, k=3, d_sae=20, mean=30.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + mean
    z = Codes(torch.rand(n, k, generator=g), torch.stack([torch.randperm(d_sae, generator=g)[:k] for _ in range(n)]),
              d_sae)  # fmt: skip
    z.values[z.values < 0.2] = 0  # selected, but does not fire
    return x, x + 0.3 * torch.randn(n, d, generator=g), z, torch.arange(n) % images


def test_sums_give_what_all_rows_give_however_large_the_mean():
    x, recon, z, item = some(mean=300.0)
    s, x64, r64 = Sums.of(x, recon, z, item, 7), x.double(), recon.double()
    spread = s.spread(mean_rows(x, item, 7))
    assert abs((s.error.sum() / spread.sum()).item() - fvu(r64, x64)) < 1e-6
    for i in range(7):
        a, b = x64[item == i], r64[item == i]
        want = [len(a), (a - a.mean(0)).square().sum(), a.square().sum(), (a - b).square().sum(), b.square().sum(),
                (a * b).sum(), torch.cosine_similarity(a, b).sum(), (b.norm(dim=1) / a.norm(dim=1)).sum(),
                (z.values[item == i] != 0).sum()]  # fmt: skip
        torch.testing.assert_close(torch.stack([v[i] for v in s]), torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(mean_rows(x, item, 7)[2].double(), x64[item == 2].mean(0), rtol=1e-6, atol=0)


def test_pooled_codes_means_and_counts_entry_by_entry():
    _, _, z, item = some()
    for form in (z, Codes(z.to_dense(), None, z.d_sae)):
        for pool in ("max", "mean"):
            pooled, mean, fires = pool_codes(form, item, 7, pool)
            at = lambda values, p=pooled: p._replace(values=values).to_dense()  # noqa: E731
            for i in range(7):
                own = z.to_dense()[item == i]
                torch.testing.assert_close(at(mean)[i], own.mean(0))
                torch.testing.assert_close(at(pooled.values)[i], own.mean(0) if pool == "mean" else own.amax(0))
                assert torch.equal(at(fires)[i], (own != 0).sum(0).int())
            assert all(len(set(row)) == len(row) for row in pooled.indices.tolist())


def test_pooled_signed_codes_are_those_of_the_largest_size():
    z = Codes(torch.tensor([[1.0, -3.0, 0.0], [-2.0, 1.0, 0.0], [0.5, 0.0, -1.0]]), None, 3)
    pooled, _, fires = pool_codes(z, torch.tensor([0, 0, 1]), 2)
    assert pooled.to_dense().tolist() == [[-2.0, -3.0, 0.0], [0.5, 0.0, -1.0]]
    assert pooled.indices[:, 0].tolist() == [1, 2] and (fires > 0).all()


def test_batches_are_one_and_rows_are_rows():
    whole, parts = some(40, images=8), []

    def through(x, recon, z, item, n):
        pooled, mean, fires = pool_codes(z, item, n)
        return Through(pooled, mean_rows(recon, item, n), Sums.of(x, recon, z, item, n),
                       TokenMeans(mean_rows(x, item, n), mean, fires))  # fmt: skip

    for images in ((0, 1, 2), (3,), (4, 5, 6, 7)):
        at = torch.isin(whole[3], torch.tensor(images))
        x, recon, z, item = whole[0][at], whole[1][at], whole[2].rows(at), whole[3][at] - images[0]
        parts.append(through(x, recon, z, item, len(images)))
    assert len({p.z.values.shape[1] for p in parts}) > 1  # batches of different widths
    one, want = Through.stack(parts), through(*whole, 8)
    pick = torch.tensor([6, 1, 3])
    for a, b in ((one, want), (one.rows(pick), want.rows(pick))):
        torch.testing.assert_close(list(a.sums), list(b.sums))
        torch.testing.assert_close(a.recon, b.recon)
        for field in (lambda t: t.z.values, lambda t: t.tokens.z, lambda t: t.tokens.fires):
            dense = [t.z._replace(values=field(t)).to_dense() for t in (a, b)]
            torch.testing.assert_close(*dense)
    assert one.rows(pick).sums.rows.tolist() == [5, 5, 5]

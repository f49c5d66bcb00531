"""Detectors: oracles of spec/probing.md section 13, traps of section 12, scikit-learn and pytorch-ood."""

import math

import pytest
import torch

from mmsae.evaluation.ood import detectors as d
from mmsae.metrics.host.ood import ood_metrics
from mmsae.types import InputError


def blobs(n=300, dim=8, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % classes
    mix = torch.eye(dim) + 0.4 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(98))
    return (means[y] + torch.randn(n, dim, generator=g) @ mix), y


def test_logit_oracles():
    logits = torch.tensor([[0.0, 0], [3, 1]])
    torch.testing.assert_close(d.msp(logits), torch.tensor([0.5, 0.880797]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(d.energy(logits), torch.tensor([0.693147, 3.126928]).double(), atol=1e-6, rtol=0)
    assert d.max_logit(logits)[1] == 3
    torch.testing.assert_close(d.msp(logits + 7), d.msp(logits))
    torch.testing.assert_close(d.energy(logits + 7), d.energy(logits) + 7)


def test_mahalanobis_oracle():
    g = d.Gaussians(torch.eye(2).double(), torch.tensor([[0.0, 0], [4, 0]]).double(), 0.0)
    assert d.MDS(g)(torch.tensor([[0.0, 1], [2, 0]])).tolist() == [-1, -4]


def test_mahalanobis_does_not_depend_on_the_coordinates():
    f, y = blobs()
    a = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).double()
    x = torch.randn(50, 8).double()
    for make in (
        lambda f: d.MDS(d.Gaussians.fit(f, y, 4, False)),
        lambda f: d.RMDS.fit(f, y, 4, False),
    ):
        torch.testing.assert_close(make(f.double())(x), make(f.double() @ a)(x @ a), rtol=1e-6, atol=1e-6)


def test_relative_mahalanobis_by_its_definition():
    f, y = blobs()
    mine = d.RMDS.fit(f, y, 4, False)
    classes, whole = d.Gaussians.fit(f, y, 4, False), d.Gaussians.fit(f, shrink=False)
    x = torch.randn(50, 8).double()
    torch.testing.assert_close(mine(x), whole.distances(x)[:, 0] - classes.distances(x).amin(1), atol=1e-6, rtol=1e-6)


def test_shrunk_relative_distances_do_not_invert_on_new_directions():
    g = torch.Generator().manual_seed(0)
    f, y = torch.zeros(120, 60), torch.arange(120) % 4
    f[:, :20] = torch.randn(120, 20, generator=g) + 3 * torch.nn.functional.one_hot(y, 20)
    new = torch.zeros(30, 60)
    new[:, 30:] = torch.randn(30, 30, generator=g)
    assert ood_metrics(d.RMDS.fit(f, y, 4, True)(f), d.RMDS.fit(f, y, 4, True)(new)).auroc > 0.5


def test_knn_oracle():
    bank = d.KNN.fit(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    query = torch.tensor([[2.0, 0]])
    one, two, three, cut = (t.item() for t in bank.ladder(query, [1, 2, 3, 50]))
    assert (one, two, three) == pytest.approx((0, math.sqrt(2) - 2, -2), abs=1e-6) and cut == three
    assert two == pytest.approx(-0.585786, abs=1e-6)


def test_zero_rows_give_no_nan():
    bank = d.KNN.fit(torch.tensor([[1.0, 0], [0, 0]]))
    assert bank.ladder(torch.zeros(1, 2), [1, 2])[1].item() == pytest.approx(-1)
    assert d.cosine_head(torch.eye(2))(torch.zeros(3, 2)).isfinite().all()


@pytest.mark.parametrize("shrink", [False, True])
def test_orientation_noise_is_less_confident_than_training(shrink):
    """Section 12.1: a distance without its minus would give 1 - AUROC."""
    f, y = blobs()
    noise = 6 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    head = d.linear_probe(f, y, 4)
    gaussians = d.Gaussians.fit(f, y, 4, shrink)
    detectors = {
        "mds": d.MDS(gaussians), "rmds": d.RMDS.fit(f, y, 4, shrink),
        "knn": lambda x: d.KNN.fit(f).ladder(x, [20])[0], "vim": d.ViM.fit(head, f, 4),
    }  # fmt: skip
    for name, detector in detectors.items():
        assert ood_metrics(detector(f), detector(noise)).auroc > 0.6, name


def test_the_probe_learns_and_folds_its_scaling():
    f, y = blobs()
    head = d.linear_probe(1000 * f + 50, y, 4)
    assert (head(1000 * f + 50).argmax(1) == y).double().mean() > 0.97
    same = d.linear_probe(f, y, 4)
    torch.testing.assert_close(head(1000 * f + 50), same(f), rtol=1e-2, atol=0.05)


def test_ledoit_wolf_is_scikit_learns():
    sk = pytest.importorskip("sklearn.covariance")
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).double() * torch.linspace(0.1, 3, 60)
    x = x - x.mean(0)
    cov, shrinkage = d.ledoit_wolf(x)
    theirs, their_shrinkage = sk.ledoit_wolf(x.numpy(), assume_centered=True)
    assert shrinkage == pytest.approx(their_shrinkage)
    torch.testing.assert_close(cov, torch.from_numpy(theirs))


def test_without_shrinkage_few_samples_are_blind_to_new_directions():
    """Section 12.4: 200 samples of 1,000 features have a covariance of rank 199 at most."""
    g = torch.Generator().manual_seed(0)
    f = torch.zeros(60, 100)
    f[:, :50] = torch.randn(60, 50, generator=g)
    new = torch.zeros(1, 100)
    new[0, 70] = 30.0
    assert d.too_few(60, 100) and not d.too_few(101, 100)
    blind = d.Gaussians.fit(f, shrink=False)
    assert blind.white.shape[1] == 50 and blind.shrinkage == 0
    assert d.MDS(blind)(new) > d.MDS(blind)(f).mean() - 1  # looks as normal as training does
    shrunk = d.Gaussians.fit(f)  # by itself, since samples are too few
    assert 0 < shrunk.shrinkage < 1 and d.MDS(shrunk)(new) < d.MDS(shrunk)(f).min()


def test_a_class_without_a_sample_is_named():
    f, y = blobs()
    with pytest.raises(InputError, match="class number 2 has no training sample"):
        d.Gaussians.fit(f[y != 2], y[y != 2], 4)


def test_react_clips_and_at_the_top_percentile_is_energy():
    f, y = blobs()
    head = d.linear_probe(f, y, 4)
    top, low = d.ReAct.fit(head, f, [100, 50])
    torch.testing.assert_close(top(f), d.energy(head(f)))
    assert low.threshold == pytest.approx(f.median().item(), abs=0.05)
    torch.testing.assert_close(low(f), d.energy(head(f.clamp(max=low.threshold))))


def test_vim_alpha_matches_logits_to_residuals():
    f, y = blobs()
    head = d.linear_probe(f, y, 4)
    vim = d.ViM.fit(head, f, 3)
    r, top = ((f.double() - vim.origin) @ vim.vectors[:, 3:]).norm(dim=1), d.max_logit(head(f))
    assert vim.scales[3].item() == pytest.approx((top.mean() / r.mean()).item())
    torch.testing.assert_close(vim(f), head(f).logsumexp(1) - top.mean() / r.mean() * r)
    last = d.ViM.fit(head, f, 500)
    assert last.dim == 7  # some residual is left
    for dim, conf in zip((3, 500, 5), vim.ladder(f, [3, 500, 5]), strict=True):
        torch.testing.assert_close(conf, d.ViM.fit(head, f, dim)(f))


class TestPytorchOod:
    """The same scores there, up to the orientation and to what does not change an order."""

    @pytest.fixture()
    def theirs(self):
        pytest.importorskip("pytorch_ood")
        import pytorch_ood.detector as theirs

        return theirs

    f, y = blobs(400)
    x = torch.cat([blobs(100, seed=5)[0], 5 * torch.randn(100, 8, generator=torch.Generator().manual_seed(6))])

    def same_order(self, mine, score):
        a, b = mine.double().argsort(), (-score).double().argsort()
        assert (a != b).double().mean() < 0.05  # rounding may exchange neighbours
        torch.testing.assert_close(torch.corrcoef(torch.stack([mine.double(), -score.double()]))[0, 1].item(), 1.0,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip

    def test_mds(self, theirs):
        ref = theirs.Mahalanobis(None).fit_features(self.f, self.y)
        mine = d.MDS(d.Gaussians.fit(self.f, self.y, 4, False))(self.x)
        self.same_order(mine, ref.predict_features(self.x))
        # theirs is half the distance under the sum, not the mean, of outer products
        torch.testing.assert_close(-2 * 400 * ref.predict_features(self.x), mine.float(), rtol=1e-3, atol=1e-2)

    def test_rmds(self, theirs):
        ref = theirs.RMD(None).fit_features(self.f, self.y)
        mine = d.RMDS.fit(self.f, self.y, 4, False)(self.x)
        self.same_order(mine, ref.predict_features(self.x))

    def test_knn(self, theirs):
        pytest.importorskip("sklearn")
        ref = theirs.KNN(None, k=7).fit_features(self.f, self.y)
        torch.testing.assert_close(-d.KNN.fit(self.f).ladder(self.x, [7])[0], ref.predict_features(self.x).square(),
                                   atol=1e-5, rtol=1e-3)  # fmt: skip

    def test_vim(self, theirs):
        g = torch.Generator().manual_seed(8)  # of full rank: they take a plain pseudo-inverse in float32
        head = d.Head(torch.randn(4, 8, generator=g).double(), torch.randn(4, generator=g).double())
        ref = theirs.ViM(None, 3, head.weight.float(), head.bias.float()).fit_features(self.f, self.y)
        torch.testing.assert_close(d.ViM.fit(head, self.f, 3)(self.x), -ref.predict_features(self.x).double(),
                                   rtol=1e-3, atol=1e-2)  # fmt: skip

    def test_logits(self, theirs):
        logits = d.linear_probe(self.f, self.y, 4)(self.x)
        for fn, name in ((d.msp, "MaxSoftmax"), (d.max_logit, "MaxLogit"), (d.energy, "EnergyBased")):
            torch.testing.assert_close(fn(logits), -getattr(theirs, name)(None).predict_logits(logits).double())

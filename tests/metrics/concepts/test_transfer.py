"""The cross-domain composite: its parts by hand, and visaebench's number."""

import numpy as np
import pytest
import torch

from mmsae import SAE
from mmsae.evaluation.card.yardstick import carried
from mmsae.evaluation.features import encode_features
from mmsae.metrics.concepts.transfer import Transfer, flat_fvu, on, overlap, sparse_probe
from mmsae.sae import TopK
from mmsae.types import Codes


def test_the_parts_by_hand():
    home, there = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 1, 0]).bool()
    assert overlap(home, there) == (2 / 3, 2 / 4)
    assert overlap(torch.zeros(2).bool(), torch.zeros(2).bool()) == (1.0, 0.0)
    assert Transfer(0.5, 1.0, 0.25, 0.75).composite == 0.625
    x, resid = torch.tensor([[1.0, -1.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    # sums of all entries 4 and 0, of squares 12 and 2: (12/2 - (4/2)^2) = 2 and 2/2 - 0 = 1
    rows = torch.ones(2)
    assert flat_fvu(x, resid, 12.0, 2.0, rows) == 0.5
    assert flat_fvu(x + 10, resid, float((x + 10).square().sum()), 2.0, rows) == 1.0  # the mean takes it all
    codes = Codes(torch.tensor([[2.0, 0.0], [1.0, -1.0]]), torch.tensor([[3, 1], [0, 2]]), 5, "image")
    assert on(codes.values, codes.indices, 5).tolist() == [True, False, False, True, False]
    assert on(codes.to_dense(), None, 5).tolist() == [True, False, False, True, False]


def test_one_feature_tells_two_classes_and_noise_does_not():
    g = np.random.default_rng(0)
    y = np.repeat([0, 1], 50)
    x = g.normal(size=(100, 6))
    assert sparse_probe(x, y, 1) < 0.8
    x[:, 4] += 8 * y
    assert sparse_probe(x, y, 1) == 1.0


def test_it_is_visaebenchs_own_number():
    cross = pytest.importorskip("visaebench.metrics.concept_detection.cross_domain")
    torch.manual_seed(0)
    sae = SAE(12, 30, modalities=("image",), selector=TopK(4)).eval()
    labels = torch.arange(90) % 3
    home, there = torch.randn(120, 12), torch.randn(90, 12) + 1.5 * torch.nn.functional.one_hot(labels, 12)

    class Given:
        def encode(self, x):
            z = sae.encode(x)
            self.info = z.info
            return z.to_dense()

        def decode(self, z):
            return sae.decode(Codes(*z.topk(4, dim=1), 30, "image", info=self.info)).detach()

    data = {"other": {"activations": there, "labels": labels.numpy()}}
    theirs = cross.CrossDomainGeneralization().compute(Given(), home, device="cpu", ood_datasets=data)
    f = encode_features(sae, there, labels, ["a", "b", "c"])
    own = encode_features(sae, home)
    ours, _ = carried(f, on(own.z.values, own.z.indices, 30))
    said = theirs.metadata["per_dataset"]["other"]
    assert ours.reconstruction == pytest.approx(said["reconstruction_quality"], abs=1e-5)
    assert (ours.coverage, ours.jaccard) == (said["domain_coverage"], said["jaccard_overlap"])
    assert ours.probe == pytest.approx(said["probe_accuracy_k10"])
    assert ours.composite == pytest.approx(theirs.value, abs=1e-5)

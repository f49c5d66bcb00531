"""Selection of the latents of a concept (T17, T18), and statistics of a toy host whose codes are known."""

from contextlib import contextmanager

import pytest
import torch

from mmsae import SAE
from mmsae.hosts.sites import COND, UNCOND, Where
from mmsae.steering.methods.unlearn import ConceptStats, above_percentile, concept_stats, selection_score
from mmsae.types import InputError


def test_t17_scores_sum_to_zero_are_antisymmetric_and_scale_free():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(4, 50, generator=g), torch.rand(4, 50, generator=g)
    s = selection_score(a, b)
    assert s.sum(-1).tolist() == pytest.approx([0] * 4, abs=1e-12)
    torch.testing.assert_close(selection_score(b, a), -s)
    torch.testing.assert_close(selection_score(7 * a, 0.1 * b), s, rtol=1e-5, atol=1e-9)
    with pytest.raises(InputError, match="codes with signs have not"):
        selection_score(a, b - 0.5)
    assert not selection_score(a, torch.zeros_like(b)).any(), "an empty background compares with nothing"


def test_t18_percentiles_give_three_two_and_one_of_20480():
    score = torch.randn(20480, generator=torch.Generator().manual_seed(1))
    for p, n in ((99.99, 3), (99.995, 2), (99.999, 1)):
        ids = above_percentile(score, p)
        assert ids.tolist() == score.topk(n).indices.tolist()
    with pytest.raises(InputError, match="percentile 100"):
        above_percentile(score, 100)


def test_t18_the_planted_latent_comes_first_at_every_step():
    g = torch.Generator().manual_seed(2)
    mean = torch.rand(3, 5, 200, generator=g)  # three concepts, five steps
    mean[:, :, 17] = 0
    mean[1, :, 17] = 3.0
    stats = ConceptStats(mean, torch.tensor([4, 4, 4]), ("cat", "dog", "bus"), 5)
    target, others = stats.split("dog")
    assert [above_percentile(s, 99.5).tolist() for s in selection_score(target, others)] == [[17]] * 5


def test_the_background_pools_prompts_and_the_threshold_averages_concepts():
    mean = torch.tensor([[[1.0, 0]], [[0, 6.0]], [[3.0, 0]]])
    stats = ConceptStats(mean, torch.tensor([1, 2, 4]), ("a", "b", "c"), 1)
    target, others = stats.split("a")
    assert target.tolist() == [[1, 0]] and others.tolist() == [pytest.approx([12 / 6, 12 / 6])]
    assert stats.threshold.tolist() == [pytest.approx([4 / 3, 2])]
    with pytest.raises(InputError, match="no statistics of concept 'd': there are a, b, c"):
        stats.split("d")
    with pytest.raises(InputError, match="no background"):
        ConceptStats(mean[:1], torch.tensor([1]), ("a",), 1).split("a")


def test_statistics_are_kept_in_a_file(tmp_path):
    stats = ConceptStats(torch.rand(2, 3, 4), torch.tensor([1, 2]), ("a cat", "b"), 3)
    again = ConceptStats.load(stats.save(tmp_path / "stats.safetensors"))
    assert torch.equal(again.mean, stats.mean) and again[1:] == (pytest.approx([1, 2]), ("a cat", "b"), 3)
    (tmp_path / "other.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="does not hold statistics"):
        ConceptStats.load(tmp_path / "other.safetensors")


class ToyHost:
    """Each prompt is a digit d; its cond rows are axis d at step t with weight t + 1, its uncond rows are axis 0."""

    def __init__(self):
        self.seeds, self.fns = [], []

    @contextmanager
    def edit(self, site, fn, *, where=False):
        self.fns.append(fn)
        yield
        self.fns.remove(fn)

    def generate(self, prompts, *, steps, seed, batch_size, twice=False):
        assert batch_size >= len(prompts)
        self.seeds += seed
        n, p = len(prompts), 4
        for step in range(steps):
            digit = torch.tensor([int(t) for t in prompts]).repeat_interleave(p)
            cond = torch.eye(8)[digit] * (step + 1)
            rows = torch.cat([torch.eye(8)[torch.zeros_like(digit)], cond])
            item = torch.arange(n).repeat_interleave(p).repeat(2)
            branch = torch.tensor([UNCOND, COND]).repeat_interleave(n * p)
            where = Where(item, torch.arange(p).repeat(2 * n), grid=(2, 2), branch=branch, step=step)
            for _ in range(1 + twice):
                for fn in self.fns:
                    assert fn(rows, where) is rows


def toy_sae():
    from mmsae.sae import AffineEncoder, Dictionary, TopK

    parts = {"encoder": AffineEncoder(bias=False, subtract_decoder_bias=False), "selector": TopK(2)}
    sae = SAE(8, d_sae=8, modalities=("image",), dictionaries={"shared": Dictionary(bias=False)}, **parts)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(8))
        sae.dictionaries["shared"].weight.copy_(torch.eye(8))
    return sae


@pytest.mark.parametrize("twice", [False, True])
def test_statistics_of_a_host_are_of_the_conditional_half_by_step(twice):
    host = ToyHost()
    stats = concept_stats(
        host, toy_sae(), "site", {"three": ["3", "3", "5"], "five": ["5"]}, steps=2, seed=10, batch_size=3, twice=twice
    )
    want = torch.zeros(2, 2, 8)
    want[0, :, 3], want[0, :, 5] = torch.tensor([2 / 3, 4 / 3]), torch.tensor([1 / 3, 2 / 3])
    want[1, :, 5] = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(stats.mean, want)
    assert stats.prompts.tolist() == [3, 1] and host.seeds == [10, 11, 12, 10] and host.fns == []
    with pytest.raises(InputError, match="'none' has no prompts"):
        concept_stats(host, toy_sae(), "site", {"none": []})

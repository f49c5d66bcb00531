"""What the host does in a step on a GPU does not grow unseen: counts on tensors that only say they are on CUDA."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from benchmarks import host_work
from benchmarks.host_work import LARGE, USUAL, WIDE, count
from benchmarks.methods import Ours, Problem

pytest.importorskip("triton")


def on_fake_cuda():
    try:
        with FakeTensorMode():
            return torch.empty(1, device="cuda").add(1).device.type == "cuda"
    except (RuntimeError, AssertionError):
        return False


fake = pytest.mark.skipif(not on_fake_cuda(), reason="this build of torch has no CUDA, not even a fake one")
# operations of torch, those that start a kernel, launches of Triton, nodes of autograd: at most
BOUNDS = {
    ("topk", USUAL): (50, 26, 10, 6),
    ("topk_auxk", USUAL): (116, 77, 11, 18),
    ("paired_topk", USUAL): (200, 133, 19, 41),
    ("topk", LARGE): (60, 30, 12, 6),
    ("topk", WIDE): (76, 36, 16, 6),
    ("topk_auxk", WIDE): (148, 88, 22, 19),
}


@fake
@pytest.mark.parametrize(("method", "size"), BOUNDS, ids=[f"{m}-{s[1]}" for m, s in BOUNDS])
def test_a_step_asks_no_more_of_the_host(method, size):
    """It also waits for nothing and has no size that depends on data: fake tensors have no values to tell."""
    work = count(Problem(method, *size)).figures()
    for (name, n), most in zip(work.items(), BOUNDS[method, size], strict=False):
        assert 0 < n <= most, (name, n)
    # the number of dead latents goes to the host where it was asked for the first time, and not in a step
    assert work["copies"] == 0 and work["float32 (batch, d_sae)"] == 0


@fake
def test_what_waits_and_what_is_wide_is_seen(monkeypatch):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        count(Problem("batch_topk", 16, 64, 4, 32))  # its codes are as wide as the fullest row
    assert count(Problem("topk", 16, 64, 4, 32), "fp32").wide == 1  # the product itself


@pytest.mark.parametrize("method", ["topk", "topk_auxk", "paired_topk", "vl_sae"])
def test_gradients_without_torchs_engine_are_those_with_it(method):
    problem, work, found = Problem(method, 16, 200, 6, 32), host_work.Work(), []
    for backward in (torch.Tensor.backward, host_work._backward(work)):
        step = Ours(problem, "cpu", "torch")
        backward(step.loss(problem.rows("cpu")))
        found.append({name: w.grad for name, (w, _) in step.weights().items()})
    assert work.nodes.total() > 5
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@fake
def test_the_command_runs(tmp_path):
    assert host_work.main(["--quick", "--device", "cpu", "--cases", "topk 768", "--out", str(tmp_path)]) == 0
    assert "| launches of Triton | 10 |" in (tmp_path / "host_work.md").read_text()

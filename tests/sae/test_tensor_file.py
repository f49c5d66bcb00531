"""Files of tensors are safetensors files, and neither writing nor reading one holds its tensors twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmsae import SAE, InputError
from mmsae.sae import TopK, tensor_file

TENSORS = {
    "wide": torch.arange(15, dtype=torch.float64).view(3, 5), "half": torch.randn(4, 3).half(), "b": torch.tensor(2.5),
    "brain": torch.randn(7).bfloat16(), "k": torch.tensor(8), "names": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "on": torch.tensor([True, False]), "none": torch.zeros(0, 4),
}  # fmt: skip


@pytest.mark.parametrize("block", [4, 50, 1 << 20])
def test_the_file_is_that_of_the_library(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensor_file, "BLOCK", block)
    tensor_file.write(tmp_path / "a", {n: (t, False) for n, t in TENSORS.items()}, {"d_sae": "3"})
    save_file(TENSORS, tmp_path / "b", metadata={"d_sae": "3"})
    ours, theirs = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert list(ours) == list(theirs)
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype and torch.equal(ours[name], t), name
    sizes = [(tmp_path / f).stat().st_size for f in "ab"]
    header = [json.loads((tmp_path / f).read_bytes()[8:].split(b"}}")[0] + b"}}") for f in "ab"]
    assert sizes[0] == sizes[1] and header[0] == header[1]
    with safe_open(tmp_path / "a", "pt") as f:
        assert f.metadata() == {"d_sae": "3"}


@pytest.mark.parametrize("block", [4, 50, 1 << 20])
def test_what_is_read_is_what_was_written(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensor_file, "BLOCK", block)
    weight = torch.randn(6, 9)
    tensor_file.write(tmp_path / "a", {"turned": (weight, True), **{n: (t, False) for n, t in TENSORS.items()}}, {})
    found = tensor_file.stored(tmp_path / "a")
    assert found["turned"].shape == (9, 6) and found["b"].shape == ()
    again = torch.zeros(6, 9)
    found["turned"].copy_to(again.t())
    assert torch.equal(again, weight)
    for name, t in TENSORS.items():
        into = torch.empty(t.shape, dtype=t.dtype)
        found[name].copy_to(into)
        assert torch.equal(into, t), name


def test_what_is_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"no x in .*: the SAE's weights are missing"):
        tensor_file.stored(tmp_path / "x")
    tensor_file.write(tmp_path / "x", {"a": (torch.zeros(5), False)}, {})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(InputError, match="x is damaged"):
        tensor_file.stored(tmp_path / "x")


MEASURE = r"""
import re, sys, torch
from mmsae import SAE
from mmsae.sae import TopK
d, n = 1024, {n}
warm = SAE(d, 64, selector=TopK(8)).save_pretrained(sys.argv[1] + "/small")
SAE.from_pretrained(warm)
# ru_maxrss would count what the process had that started this one
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
if sys.argv[2] == "load":
    sae = SAE.from_pretrained(sys.argv[1] + "/large")
    print(peak() - before)
else:
    with torch.device("meta"):
        sae = SAE(d, n, selector=TopK(8))
    sae.to_empty(device="cpu").requires_grad_(False)
    for p in [*sae.parameters(), *sae.buffers()]:
        p.zero_()  # now all of it is in memory
    sae.selector.set_k(8)
    held = peak()
    sae.save_pretrained(sys.argv[1] + "/large")
    print(peak() - held)
"""


@pytest.mark.parametrize(("latents", "megabytes"), [(51_200, 419)])
def test_no_second_copy_of_the_weights(tmp_path, latents, megabytes):
    """Peaks of memory of processes that save and load an SAE of 419 MB."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE.format(n=latents))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def peak(what):
        done = subprocess.run([sys.executable, script, tmp_path, what], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    saving = peak("save")
    weights = (tmp_path / "large" / "sae_weights.safetensors").stat().st_size
    assert weights // 10**6 == megabytes
    assert saving < 0.15 * weights, f"saving took {saving / weights:.2f} of the weights more than they have"
    loading = peak("load")
    assert 0.9 * weights < loading < 1.3 * weights, f"loading took {loading / weights:.2f} of the weights"


def test_loading_onto_a_device_and_training_on(tmp_path):
    torch.manual_seed(0)
    sae = SAE(8, 32, modalities=["image"], selector=TopK(3))
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"), device="cpu").requires_grad_().train()
    x = torch.randn(16, 8)
    again({"image": x})["image"].x_hat.square().sum().backward()
    assert all(p.grad is not None and p.device.type == "cpu" for p in again.parameters())
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in sae.state_dict().items()}

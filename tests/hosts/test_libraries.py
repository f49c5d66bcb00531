"""Hosts' libraries without torch's compiler, which works all the same when somebody uses it."""

import subprocess
import sys

import pytest

from tests.helpers.encoders import MODELS, save_local

# each in a process of its own, that has imported nothing
HOST = """
import sys
from mmsae.hosts import load_host
host = load_host(sys.argv[1])
host.encode_image(host.probe_input("image", 2))
assert "torchvision" in sys.modules and "timm" in sys.modules
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
import torch._dynamo
assert torch._dynamo.utils.is_compile_supported("cpu") in (True, False)
"""

COMPILED = """
import sys
import torch
from mmsae.hosts.libraries import _disable, library

library("timm")
assert "torch._dynamo" not in sys.modules

@_disable
def apart(x):
    return x.sin()

@_disable(reason="a test")
def too(x):
    return x.tan()

x = torch.ones(3)
assert torch.equal(apart(x), x.sin()) and torch.equal(too(x), x.tan()) and apart.__name__ == "apart"
assert "torch._dynamo" not in sys.modules
compiled = []

def backend(graph, inputs):
    compiled.extend(n.target for n in graph.graph.nodes if n.op == "call_method")
    return graph.forward

@torch.compile(backend=backend)
def f(x):
    return too(apart(x.cos())).exp()

assert torch.equal(f(x), x.cos().sin().tan().exp())
assert compiled == ["cos", "exp"], compiled
"""

UNKNOWN = """
import sys
from mmsae.hosts import libraries

with libraries._lean():
    import torch._dynamo
    assert type(torch._dynamo).__name__ == "_Absent"
    from torch._dynamo import allow_in_graph  # not known: the compiler is imported
    assert allow_in_graph is sys.modules["torch._dynamo"].allow_in_graph
    assert type(sys.modules["torch._dynamo"]).__name__ == "module"
real = sys.modules["torch._dynamo"]
with libraries._lean():
    import torch._dynamo
    assert torch._dynamo is real is sys.modules["torch._dynamo"]
"""

FAILING = """
import gc, sys
from mmsae.hosts import libraries

try:
    with libraries._lean():
        assert not gc.isenabled()
        raise ImportError("half way")
except ImportError:
    pass
assert gc.isenabled() and "torch._dynamo" not in sys.modules
import torch._dynamo
assert torch._dynamo.disable is not libraries._disable
"""


def run(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_host_needs_no_compiler(tmp_path):
    run(HOST, save_local(tmp_path, MODELS["timm_resnet"]))


@pytest.mark.parametrize("code", [COMPILED, UNKNOWN, FAILING], ids=["compiled", "unknown", "failing"])
def test_the_compiler_is_itself_when_it_is_used(code):
    run(code)

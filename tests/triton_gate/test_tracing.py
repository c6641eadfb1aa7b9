"""What compilers see of the operators where Triton is the backend: its kernels, and what those write to."""

import cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from bkd_fast.ops import backend
from bkd_fast.ops.top_mean import top_mean
from tools.triton_gate import kernels as triton_kernels

reason = triton_kernels.why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
ops = torch.ops.bkd_fast
GEOMETRY = [1, 1], [1, 1], [1, 1]
LEVELS = [cases.random(2, 5, 6, 7), cases.random(2, 3, 4, 4, seed=1)]
_, (INPUT, WEIGHT, OFFSET, MASK, BIAS) = cases.conv()
_, DEEP = cases.conv(channels=35)
OUTPUT = cases.random(2, 13, 7, 9)
_, (TABLE, PLACES, SHARES) = cases.gather()
READ = cases.random(2, 19, 6, 5)
_, (QUERY, MEMORY) = cases.attention()
MAP = cases.random(2, 9, 9)
QUERIES, SUPPORT, SHOTS, _ = cases.match()
SETTINGS = [9, 9], "product", 1.0, [1.0, 1.0], [1.0, 1.0], False, 0.2
# Call, its tensors, and the names of what its kernels write to, in turn.
CALLS = {
    "conv": (
        lambda i, o, w, b, m: ops.modulated_deform_conv2d(i, o, w, b, *GEOMETRY, m),
        [INPUT, OFFSET, WEIGHT, BIAS, MASK],
        [{"output"}],
    ),
    "conv, split depth": (
        lambda i, w, o, m, b: ops.modulated_deform_conv2d(i, o, w, b, *GEOMETRY, m),
        DEEP,
        [{"output"}, {"output"}],
    ),
    "conv, backward": (
        lambda g, i, o, w, b, m: ops.modulated_deform_conv2d_backward(g, i, o, w, b, *GEOMETRY, m, [True] * 5),
        [OUTPUT, INPUT, OFFSET, WEIGHT, BIAS, MASK],
        [{"grad_input", "grad_offset", "grad_mask"}, {"sums"}],
    ),
    "gather": (
        lambda p, o, m: ops.modulated_deform_gather(p, o, m, [3, 3], *GEOMETRY),
        [TABLE, PLACES, SHARES],
        [{"output"}],
    ),
    "gather, backward": (
        lambda g, p, o, m: ops.modulated_deform_gather_backward(g, p, o, m, [3, 3], *GEOMETRY, [True] * 3),
        [READ, TABLE, PLACES, SHARES],
        [{"grad_projected", "grad_offset", "grad_mask"}],
    ),
    "attention": (
        lambda q, m: ops.sparse_memory_attention(q, m, 0.02, 0.3, True),
        [QUERY, MEMORY],
        [{"output"}],
    ),
    "attention, backward": (
        lambda q, m: ops.sparse_memory_attention_backward(q, q, m, 0.02, 0.3, True, [True, True]),
        [QUERY, MEMORY],
        [{"grad_dot", "read", "pull"}],
    ),
    "anomaly": (
        lambda s, t: ops.cosine_anomaly_map([s, t], [s, t], *SETTINGS),
        LEVELS,
        [{"distances"}, {"distances"}, {"fused"}, {"smoothed"}, {"smoothed"}],
    ),
    "anomaly, backward": (
        lambda g, s, t: ops.cosine_anomaly_map_backward(g, [s, t], [s, t], *SETTINGS, [False, False, True, True]),
        [MAP, *LEVELS],
        [{"distances", "first_sums"}, {"distances", "first_sums"}, {"grad_student"}, {"grad_student"}],
    ),
    "loss": (
        lambda s, t: ops.distillation_loss([s, t], [s, t], "pixel", 0.5),
        LEVELS,
        [{"statistics", "parts"}, {"total"}, {"statistics", "parts"}, {"total"}],
    ),
    "loss, backward": (
        lambda g, q, s, t: ops.distillation_loss_backward(g, q, [s, t], [s, t], "flat", 0.5, [False] * 2 + [True] * 2),
        [torch.ones(()), torch.zeros(12), *LEVELS],
        [{"grad_student"}, {"grad_student"}],
    ),
    "match": (lambda q, s, n: ops.local_match(q, s, n, 1), [QUERIES, SUPPORT, SHOTS], [{"distance", "displacement"}]),
    "top mean": (lambda v: top_mean(v, 3), [torch.ones(2, 9)], [{"mean"}]),
}


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    """There is no device to ask."""
    from bkd_fast.ops.deform_conv import triton as kernels

    monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: 4)


@pytest.mark.parametrize("name", CALLS)
def test_compilers_see_the_kernels_and_what_they_write(name):
    call, tensors, written = CALLS[name]
    found = [set(node.kwargs["tensors_to_clone"]) for node in _nodes(call, tensors, "triton_kernel_wrapper_functional")]
    assert found == written
    assert not _nodes(call, tensors, "bkd_fast")


def test_other_backends_and_exported_programs_keep_the_call():
    call, tensors, _ = CALLS["conv"]
    (node,) = _nodes(call, tensors, "bkd_fast", chosen="reference")
    assert str(node.target) == "bkd_fast.modulated_deform_conv2d.default"

    class Module(torch.nn.Module):
        def forward(self, *given):
            return call(*given)

    program = torch.export.export(Module(), tuple(tensors))
    assert [str(node.target) for node in program.graph.nodes if "deform" in str(node.target)] == [
        "bkd_fast.modulated_deform_conv2d.default"
    ]


def _nodes(call, tensors, target, chosen="triton"):
    """Of the graph that a compiler gets, those whose target has a word in it. No GPU is needed: nothing has data."""
    from tools.triton_gate.target import compiling_for

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), compiling_for(90):
        fakes = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda") for one in tensors]
        with backend(chosen):
            graph = make_fx(dispatch_functionalize(call))(*fakes).graph
    return [node for node in graph.nodes if target in str(node.target)]

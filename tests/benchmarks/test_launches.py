"""The launch budget: how many kernels one image may launch on a CUDA device, counted without one."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("bkd_fast.ops.native", reason="no compiled kernels")
import launches

# Kernels of one image with the default configuration. A change may lower these.
CEILINGS = {"ResNet18": 43, "WRN50": 71, "Lite0": 93}
RETRIEVAL = 5  # of them: descriptors, products, the nearest, matches, and the distance of the whole image
# What the teacher's network is made of once its convolutions are fused.
FUSED = {*launches.FUSED, "convolution", "bkd_fast bias_activation", "max_pool2d_with_indices"}


@pytest.mark.parametrize("label", launches.TEACHERS)
def test_an_image_launches_no_more_kernels_than_its_budget(label):
    counts = launches.count(label)
    assert sum(counts.values()) <= CEILINGS[label], launches.table({label: counts})
    parts = {part for part, _ in counts}
    assert parts >= {"teacher network", "retrieval", "memory", "map", "score"}
    assert "other" not in parts, "a kernel outside of every part: name its part in bkd_fast/benchmark/parts.py"
    assert {operation for part, operation in counts if part == "teacher network"} <= FUSED, "fusing has failed"
    assert sum(kernels for (part, _), kernels in counts.items() if part == "retrieval") <= RETRIEVAL
    own = {operation for _, operation in counts if operation.startswith("bkd_fast ")}
    assert own >= {"bkd_fast anomaly_map", "bkd_fast match_supports"}


def test_kernels_are_counted_and_views_are_not():
    with launches.FakeTensorMode(), torch.no_grad(), launches.Counter() as counter:
        x, weight, bias = (torch.empty(shape, device="cuda") for shape in ((1, 3, 8, 8), (4, 3, 3, 3), (4,)))
        F.conv2d(x, weight, bias).relu_().permute(0, 2, 3, 1).flatten(0, 2)[:, :2]
        assert dict(counter.kernels) == {("other", "convolution"): 2, ("other", "relu_"): 1}
        with counter.part("pad"):
            F.pad(x, (1, 1))
        F.conv2d(x, weight)
        torch.nn.functional.linear(x, x[0, 0])
    assert counter.kernels["pad", "constant_pad_nd"] == 2
    assert counter.kernels["other", "convolution"] == 3
    assert counter.kernels["other", "mm"] == 1

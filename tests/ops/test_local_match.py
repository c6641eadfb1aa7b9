"""Matching in a window, on every backend of the CPU."""

import cases
import numpy as np
import pytest
import torch

from bkd_fast.export.plain import plain
from bkd_fast.ops import local_match

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", cases.MATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_least_of_all_distances(name, dtype, each_backend):
    case = cases.MATCHES[name]()
    cases.check_match(cases.matched(case, each_backend, dtype), case, dtype)


@pytest.mark.parametrize("shots", [1, 2, 3])
@pytest.mark.parametrize("radius", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (9, 5)])
def test_every_radius_in_float64(shots, radius, size):
    case = cases.match(size=size, shots=shots, radius=radius)
    query, support = case.query.double(), case.support.double()
    distance, displacement = local_match(query, support, case.shots, radius)
    assert distance.dtype == displacement.dtype == torch.float64
    exact, place = cases.window(case._replace(query=query, support=support)).min(0)
    torch.testing.assert_close(distance, exact)
    side = 2 * radius + 1
    assert torch.equal(displacement, torch.stack([place // side - radius, place % side - radius], 2).double())


@pytest.mark.parametrize("query_type", TYPES)
@pytest.mark.parametrize("support_type", TYPES)
def test_types_may_be_mixed_but_for_float64(query_type, support_type):
    case = cases.match()
    query, support = case.query.to(query_type), case.support.to(support_type)
    if (query_type == torch.float64) != (support_type == torch.float64):
        with pytest.raises(TypeError, match="float64 cannot be mixed"):
            local_match(query, support, case.shots, 1)
        return
    distance, displacement = local_match(query, support, case.shots, 1)
    wide = torch.float64 if query_type == torch.float64 else torch.float32
    assert distance.dtype == displacement.dtype == wide
    expected = local_match(query.to(wide), support.to(wide), case.shots, 1)
    torch.testing.assert_close(distance, expected[0])
    assert torch.equal(displacement, expected[1])


def test_any_strides_are_accepted():
    case = cases.match()
    expected = local_match(*case)
    images = [
        tensor.repeat_interleave(2, -1)[..., ::2].transpose(1, 2).contiguous().transpose(1, 2) for tensor in case[:2]
    ]
    matches = local_match(*images, case.shots.t().contiguous().t(), case.radius)
    for one, other in zip(matches, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other)


def test_of_equal_distances_the_shortest_move_is_taken_and_then_the_first():
    query, support = torch.zeros(1, 3, 5, 5), torch.ones(1, 3, 5, 5)

    def move_to(*places):
        images = support.clone()
        for y, x in places:
            images[..., y, x] = 0
        distance, displacement = local_match(query, images, torch.zeros(1, 1, dtype=torch.int64), 2)
        assert distance[0, 0, 2, 2] == float(not places)
        return displacement[0, 0, :, 2, 2].tolist()

    assert move_to() == [0, 0]
    assert move_to((0, 0), (1, 1), (3, 2)) == [1, 0]
    assert move_to((1, 2), (2, 1), (2, 3), (3, 2)) == [-1, 0]
    assert move_to((2, 3), (2, 1)) == [0, -1]
    assert move_to((3, 3), (3, 1), (1, 3)) == [-1, 1]
    assert move_to((0, 2), (1, 1)) == [-1, -1]
    assert move_to((4, 2), (2, 2)) == [0, 0]


def test_nothing_outside_the_image_is_a_candidate():
    """Where what lies in it is far away, and zeros around it would be near."""
    query, support = torch.zeros(1, 4, 3, 4), torch.full((1, 4, 3, 4), 2.0)
    distance, displacement = local_match(query, support, torch.zeros(1, 2, dtype=torch.int64), 3)
    assert (distance == 4).all()
    assert not displacement.any()


def test_nan_loses_to_any_number():
    query, support = torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 5)
    support[0, 0, :, 1:] = torch.nan
    support[0, 1, :, 0] = torch.inf
    distance, displacement = local_match(query, support, torch.zeros(1, 1, dtype=torch.int64), 1)
    assert (distance[0, 0, :, :2] == torch.inf).all()
    assert displacement[0, 0, :, 1, 1].tolist() == [0, -1]
    assert displacement[0, 0, :, 1, 0].tolist() == [0, 0]
    assert distance[0, 0, :, 2:].isnan().all()
    assert not displacement[..., 2:].any()
    query[0, 1, 1, 1] = torch.nan
    distance, displacement = local_match(query, support.zero_(), torch.zeros(1, 1, dtype=torch.int64), 1)
    assert distance.isnan().sum() == 1
    assert distance[0, 0, 1, 1].isnan()


@pytest.mark.parametrize(("batch", "shots"), [(0, 2), (2, 0)])
def test_no_queries_and_no_shots(batch, shots):
    case = cases.match(batch=batch, shots=shots)
    distance, displacement = local_match(*case)
    assert distance.shape == (batch, shots, 7, 9)
    assert displacement.shape == (batch, shots, 2, 7, 9)


def test_it_finds_where_an_image_was_moved_to():
    query = cases.random(1, 8, 12, 12)
    moved = torch.roll(query, (2, -1), (2, 3))
    distance, displacement = local_match(query, moved, torch.zeros(1, 1, dtype=torch.int64), 2)
    assert not distance[..., :-2, 1:].any()
    assert torch.equal(displacement[0, 0, :, :-2, 1:], torch.tensor([2.0, -1.0])[:, None, None].expand(2, 10, 11))


IMAGES, SHOTS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"query": torch.zeros(2, 3, 4)}, ValueError, r"query has shape \(2, 3, 4\), expected \(N, C, H, W\)"),
        ({"query": torch.zeros(2, 0, 4, 5)}, ValueError, "expected no size 0 but the batch"),
        ({"query": IMAGES.long()}, TypeError, "query is torch.int64, expected float16"),
        ({"support": [IMAGES]}, TypeError, "support is of type list, expected a tensor"),
        ({"support": IMAGES[:, :2]}, ValueError, r"support has shape \(2, 2, 4, 5\), expected \(P, 3, 4, 5\)"),
        ({"support": IMAGES.double()}, TypeError, "float64 cannot be mixed"),
        ({"support": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "support is on meta and query on cpu"),
        ({"shots": [[0], [0]]}, TypeError, "shots is of type list, expected a tensor"),
        ({"shots": SHOTS.int()}, TypeError, "shots is torch.int32, expected int64"),
        ({"shots": SHOTS[:1]}, ValueError, r"shots has shape \(1, 1\), expected \(2, k\)"),
        ({"shots": SHOTS.to("meta")}, ValueError, "shots is on meta and query on cpu"),
        ({"shots": SHOTS + 2}, IndexError, "shots has 2, expected 0 to 1, the images of support"),
        ({"shots": SHOTS - 1}, IndexError, "shots has -1, expected 0 to 1"),
        ({"radius": 9}, ValueError, "radius is 9, expected an integer from 0 to 8"),
        ({"radius": -1}, ValueError, "radius is -1"),
        ({"radius": 1.0}, ValueError, "radius is 1.0, expected an integer"),
        ({"radius": True}, ValueError, "radius is True, expected an integer"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, words):
    arguments = {"query": IMAGES, "support": IMAGES, "shots": SHOTS, "radius": 1, **changes}
    with pytest.raises(error, match=words):
        local_match(**arguments)


class Module(torch.nn.Module):
    def forward(self, query, support, shots):
        return local_match(query, support, shots, 1)


def program():
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(Module(), tuple(cases.match()[:3]), dynamic_shapes=({0: batch}, None, {0: batch}))


def test_exports_with_a_dynamic_batch():
    exported, larger = program(), cases.match(5)
    (call,) = [node for node in exported.graph.nodes if "local_match" in str(node.target)]
    assert str(call.target) == "bkd_fast.local_match.default"
    for one, other in zip(exported.module()(*larger[:3]), local_match(*larger), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("format", ["pt2", "onnx", "openvino"])
def test_other_run_times_compute_it(format, tmp_path, each_backend):
    if each_backend != "reference":
        pytest.skip("the program is the same for every backend")
    case = cases.match(5, whole=True)
    inputs = [tensor.numpy() for tensor in case[:3]]
    exported = plain(program())
    assert not any("bkd_fast" in str(node.target) for node in exported.graph.nodes)
    if format == "pt2":
        outputs = [value.numpy() for value in exported.module()(*case[:3])]
    else:
        pytest.importorskip("onnxscript")
        torch.onnx.export(exported, dynamo=True, opset_version=18, verbose=False).save(tmp_path / "match.onnx")
        if format == "onnx":
            session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "match.onnx")
            names = [one.name for one in session.get_inputs()]
            outputs = session.run(None, dict(zip(names, inputs, strict=True)))
        else:
            openvino = pytest.importorskip("openvino")
            model = openvino.Core().compile_model(openvino.convert_model(tmp_path / "match.onnx"), "CPU")
            results = model(inputs)
            outputs = [results[index] for index in range(2)]
    for one, other in zip(outputs, local_match(*case), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)

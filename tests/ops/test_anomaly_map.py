import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from bkd_fast.ops import cosine_anomaly_map

SHAPES = ((2, 3, 8, 6), (2, 5, 4, 3), (2, 4, 2, 2))


def levels(branches=1, dtype=torch.float64, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def one():
        return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    return one(), [level for _ in range(branches) for level in one()]


def loop(teacher, student, size, fusion, sigma, weights, exponents, align_corners, value_share):
    """Eq. 13 at each pixel of each level, then PyTorch's upsampling and SciPy's smoothing."""
    count = len(teacher)
    weights = weights or [1.0] * len(student)
    fused = 1.0 if fusion == "product" else 0.0
    for level, t in enumerate(teacher):
        distance = torch.zeros(t.shape[0], *t.shape[2:], dtype=torch.float64)
        for index in range(level, len(student), count):
            for n, i, j in np.ndindex(*distance.shape):
                a, b = t[n, :, i, j].numpy(), student[index][n, :, i, j].numpy()
                cosine = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8)
                value = (1 - value_share) * (1 - cosine) + value_share * ((a - b) ** 2).mean()
                distance[n, i, j] += weights[index] * value
        power = exponents[level] if exponents else 1.0
        up = F.interpolate(distance[:, None] ** power, size=size, mode="bilinear", align_corners=align_corners)[:, 0]
        fused = fused * up if fusion == "product" else fused + up
    if not sigma:
        return fused
    return torch.stack([torch.from_numpy(gaussian_filter(image.numpy(), sigma, truncate=4)) for image in fused])


@pytest.mark.parametrize("fusion", ["product", "sum"])
@pytest.mark.parametrize("sigma", [0.0, 1.5, 30.0])
@pytest.mark.parametrize(("align_corners", "value_share"), [(False, 0.0), (True, 0.3), (False, 1.0)])
@pytest.mark.parametrize("exponents", [None, (0.3, 1.0, 2.5)])
def test_equals_a_loop_over_the_equation(fusion, sigma, align_corners, value_share, exponents):
    teacher, student = levels(branches=2)
    arguments = ((9, 11), fusion, sigma, [1.0, 2.0, 0.5, 3.0, 1.5, 0.1], exponents, align_corners, value_share)
    size, fusion, sigma, weights, exponents, align_corners, value_share = arguments
    anomaly_map = cosine_anomaly_map(
        teacher, student, size, fusion=fusion, sigma=sigma, weights=weights, exponents=exponents,
        align_corners=align_corners, value_share=value_share,
    )  # fmt: skip
    torch.testing.assert_close(anomaly_map, loop(teacher, student, *arguments))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 2), shapes=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), branches=st.integers(1, 2), sigma=st.floats(0, 3),
)  # fmt: skip
def test_equals_the_loop_on_any_small_shape(batch, shapes, size, branches, sigma):
    teacher, student = levels(branches, shapes=[(batch, *shape) for shape in shapes])
    anomaly_map = cosine_anomaly_map(teacher, student, size, sigma=sigma)
    assert anomaly_map.shape == (batch, *size)
    if batch:
        torch.testing.assert_close(anomaly_map, loop(teacher, student, size, "product", sigma, None, None, False, 0.0))


@pytest.mark.parametrize("fusion", ["product", "sum"])
@pytest.mark.parametrize("value_share", [0.0, 0.4])
@pytest.mark.parametrize("exponents", [[1.0, 1.0, 1.0], [0.6, 1.0, 2.0]])
def test_gradients_are_derivatives(fusion, value_share, exponents):
    teacher, student = levels(branches=2)
    tensors = [level.requires_grad_() for level in teacher + student]

    def call(*values):
        return cosine_anomaly_map(
            values[:3], values[3:], (7, 6), fusion=fusion, sigma=1.2, weights=range(1, 7), exponents=exponents,
            value_share=value_share,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_product_of_small_distances_does_not_vanish(dtype):
    """Three levels at 3e-3 make 2.7e-8, which is zero in half precision; the map is float32."""
    teacher = [torch.ones(1, 64, 4, 4, dtype=dtype) for _ in range(3)]
    student = []
    for level in teacher:
        moved = level.clone()
        moved[:, ::2] += 0.16
        student.append(moved)
    anomaly_map = cosine_anomaly_map(teacher, student, (8, 8), sigma=2.0)
    assert anomaly_map.dtype == torch.float32
    assert (anomaly_map > 1e-9).all()
    exact = cosine_anomaly_map([v.double() for v in teacher], [v.double() for v in student], (8, 8), sigma=2.0)
    torch.testing.assert_close(anomaly_map, exact.float(), rtol=2e-2, atol=0)


def test_zero_vectors_are_at_distance_one():
    teacher = [torch.zeros(1, 3, 2, 2)]
    student = [torch.randn(1, 3, 2, 2).requires_grad_()]
    anomaly_map = cosine_anomaly_map(teacher, student, (2, 2), sigma=0.0)
    torch.testing.assert_close(anomaly_map, torch.ones(1, 2, 2))
    anomaly_map.sum().backward()
    assert student[0].grad.isfinite().all()


def test_equal_features_are_at_distance_zero_to_any_power():
    """Rounding makes some distances negative, of which there is no power, and slopes at zero are infinite."""
    teacher = [torch.rand(1, 64, 16, 16)]
    student = [(3 * teacher[0]).requires_grad_()]
    anomaly_map = cosine_anomaly_map(teacher, student, 16, exponents=[0.5])
    assert anomaly_map.isfinite().all()
    assert (anomaly_map < 1e-2).all()
    anomaly_map.sum().backward()
    assert student[0].grad.isfinite().all()


def test_layouts_do_not_matter():
    teacher, student = levels(dtype=torch.float32)
    expected = cosine_anomaly_map(teacher, student, (8, 8))
    last = [[level.contiguous(memory_format=torch.channels_last) for level in side] for side in (teacher, student)]
    torch.testing.assert_close(cosine_anomaly_map(*last, 8), expected)


@pytest.mark.parametrize(
    ("teacher", "student", "options", "words"),
    [
        ([], [], {}, "teacher has 0 levels"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)] * 0, {}, "student 0"),
        ([(1, 2, 3, 3)] * 2, [(1, 2, 3, 3)] * 3, {}, "teacher has 2 levels and student 3"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 4)], {}, r"student\[0\] has shape \(1, 2, 3, 4\), expected \(1, 2, 3, 3\)"),
        ([(1, 2, 3)], [(1, 2, 3)], {}, r"teacher\[0\] has shape \(1, 2, 3\)"),
        ([(1, 2, 3, 3), (2, 2, 3, 3)], [(1, 2, 3, 3)] * 2, {}, r"teacher\[1\] has shape"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], {"fusion": "max"}, "fusion is 'max'"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], {"sigma": -1.0}, "sigma is -1.0"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], {"value_share": 2.0}, "value_share is 2.0, expected 0 to 1"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], {"weights": [1.0, 2.0]}, "weights has 2 numbers, expected 1"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], {"exponents": [0.0]}, "exponents is .0.0., expected 1 positive numbers"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], {"exponents": [1.0, 1.0]}, "exponents is"),
        ([(1, 2, 3, 3)], [(1, 2, 3, 3)], {"size": (0, 4)}, r"size is \(0, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(teacher, student, options, words):
    made = [[torch.zeros(shape) for shape in side] for side in (teacher, student)]
    with pytest.raises((TypeError, ValueError), match=words):
        cosine_anomaly_map(*made, **{"size": (4, 4), **options})

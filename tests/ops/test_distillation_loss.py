import numpy as np
import pytest
import torch

from bkd_fast.ops import distillation_loss

SHAPES = ((2, 3, 4, 5), (2, 6, 2, 3))


def levels(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    made = [
        [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes] for _ in range(2)
    ]
    return made[0], made[1]


def loop(teacher, student, direction, value_weight):
    """Eq. 12's two terms, one vector at a time."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        t, s = t.numpy(), s.numpy()
        if direction == "flat":
            pairs = [(t[n].ravel(), s[n].ravel()) for n in range(len(t))]
        else:
            pairs = [(t[n, :, i, j], s[n, :, i, j]) for n, i, j in np.ndindex(t.shape[0], *t.shape[2:])]
        total += np.mean([1 - a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8) for a, b in pairs])
        total += value_weight * ((t - s) ** 2).mean()
    return torch.tensor(total)


@pytest.mark.parametrize("direction", ["flat", "pixel"])
@pytest.mark.parametrize("value_weight", [0.0, 0.5])
def test_equals_a_loop_over_the_equation(direction, value_weight):
    teacher, student = levels()
    loss = distillation_loss(teacher, student, direction=direction, value_weight=value_weight)
    torch.testing.assert_close(loss, loop(teacher, student, direction, value_weight))


@pytest.mark.parametrize("direction", ["flat", "pixel"])
def test_gradients_are_derivatives(direction):
    teacher, student = levels()
    tensors = [level.requires_grad_() for level in teacher + student]
    assert torch.autograd.gradcheck(lambda *v: distillation_loss(v[:2], v[2:], direction=direction), tensors)


def test_equal_levels_lose_nothing():
    teacher, _ = levels()
    torch.testing.assert_close(distillation_loss(teacher, teacher), torch.zeros((), dtype=torch.float64))


def test_a_frozen_teacher_gets_no_gradient():
    teacher, student = levels()
    student = [level.requires_grad_() for level in student]
    distillation_loss(teacher, student).backward()
    assert all(level.grad is not None for level in student)
    assert all(level.grad is None for level in teacher)


def test_zero_vectors_have_finite_gradients():
    student = [torch.zeros(1, 2, 3, 3).requires_grad_()]
    distillation_loss([torch.ones(1, 2, 3, 3)], student, direction="pixel").backward()
    assert student[0].grad.isfinite().all()


def test_an_empty_batch_loses_nothing():
    teacher, student = levels(shapes=[(0, 3, 4, 5)])
    assert distillation_loss(teacher, student) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    teacher, student = levels(dtype, shapes=[(2, 64, 32, 32)])
    loss = distillation_loss(teacher, student)
    assert loss.dtype == torch.float32
    exact = loop([level.double() for level in teacher], [level.double() for level in student], "flat", 0.5)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_float32_teacher_and_a_bfloat16_student_mix():
    teacher, student = levels(torch.float32)
    mixed = [level.bfloat16().requires_grad_() for level in student]
    loss = distillation_loss(teacher, mixed)
    torch.testing.assert_close(loss, distillation_loss(teacher, [level.float() for level in mixed]))
    loss.backward()
    assert mixed[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (4, {}, "student has 4 levels, expected 2"),
        (2, {"direction": "both"}, "direction is 'both'"),
        (2, {"value_weight": -1.0}, "value_weight is -1.0"),
    ],
)
def test_what_does_not_fit_is_named(count, options, words):
    teacher, student = levels()
    with pytest.raises(ValueError, match=words):
        distillation_loss(teacher, (student * 2)[:count], **options)

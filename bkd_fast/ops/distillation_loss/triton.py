"""The distillation loss in Triton: one read of the features gives both terms, and the sums that its gradient needs."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.distillation_loss import Arguments
from bkd_fast.ops.layout import CHUNK_BYTES, floats
from bkd_fast.ops.levels import Levels
from bkd_fast.ops.triton_common import Tuned, bucket, config, operator
from bkd_fast.ops.triton_pairs import hinted, layout, one_less_cosine, pair_gradients, pair_sums, sizes, start_of
from bkd_fast.ops.triton_sampling import chunks

SPLIT = 4096  # numbers of an image, or more, that one program sums up where all of it is one vector
MAX_SPLITS = 64
PIXELS = 32  # whose parts of the loss are added up by one program


@triton.jit
def loss_images_kernel(teacher, student, parts, numbers, splits, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Accumulator over a split of one image's numbers: dot product, both squares, and the square of the difference."""
    if WHOLE:
        numbers = chunks(numbers, teacher.dtype)
    image = tl.program_id(0).to(tl.int64)
    each = tl.cdiv(tl.cdiv(numbers, splits), BLOCK).to(tl.int64) * BLOCK
    begin = tl.program_id(1) * each
    base = image * numbers
    dot = tl.zeros((BLOCK,), tl.float32)
    teacher_square = tl.zeros((BLOCK,), tl.float32)
    student_square = tl.zeros((BLOCK,), tl.float32)
    difference = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, tl.minimum(begin + each, numbers), BLOCK):
        index = start + tl.arange(0, BLOCK)
        t = tl.load(teacher + base + index, mask=index < numbers, other=0.0).to(tl.float32)
        s = tl.load(student + base + index, mask=index < numbers, other=0.0).to(tl.float32)
        dot += t * s
        teacher_square += t * t
        student_square += s * s
        difference += (t - s) * (t - s)
    to = parts + (image * splits + tl.program_id(1)) * 4
    tl.store(to, tl.sum(dot, 0))
    tl.store(to + 1, tl.sum(teacher_square, 0))
    tl.store(to + 2, tl.sum(student_square, 0))
    tl.store(to + 3, tl.sum(difference, 0))


@triton.jit
def loss_pixels_kernel(
    teacher, student, statistics, parts, pixels, plane, channels, image_stride, channel_stride, pixel_stride, problem,
    LAST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics (3, pixels) of a block of pixels, and the sums over it of 1 - cos and of squared differences."""
    pixels, plane, channels, image_stride, channel_stride, pixel_stride = hinted(
        pixels, plane, channels, image_stride, channel_stride, pixel_stride, teacher.dtype, LAST, WHOLE
    )
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = pixel < pixels
    at, _ = start_of(pixel, plane, image_stride, pixel_stride)
    t, dot, s, difference, _, _, _ = pair_sums(
        teacher, student, student, at, valid, channels, channel_stride, False, BLOCK_P, BLOCK_C
    )
    tl.store(statistics + pixel, dot, mask=valid)
    tl.store(statistics + pixels + pixel, t, mask=valid)
    tl.store(statistics + 2 * pixels + pixel, s, mask=valid)
    tl.store(parts + 2 * tl.program_id(0), tl.sum(tl.where(valid, one_less_cosine(dot, t, s), 0.0), 0))
    tl.store(parts + 2 * tl.program_id(0) + 1, tl.sum(difference, 0))


@triton.jit
def loss_total_kernel(
    parts, statistics, total, count, splits, vectors, numbers, value_weight, IMAGES: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds a level to the loss, in one order.

    parts: of each of ``count`` images the sums of its splits, of which the statistics are made, or of each of ``count``
    blocks of pixels two.
    """
    direction = tl.zeros((BLOCK,), tl.float32)
    value = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        valid = index < count
        if IMAGES:
            dot = tl.zeros((BLOCK,), tl.float32)
            t = tl.zeros((BLOCK,), tl.float32)
            s = tl.zeros((BLOCK,), tl.float32)
            for split in range(0, splits):
                at = parts + (index * splits + split) * 4
                dot += tl.load(at, mask=valid, other=0.0)
                t += tl.load(at + 1, mask=valid, other=0.0)
                s += tl.load(at + 2, mask=valid, other=0.0)
                value += tl.load(at + 3, mask=valid, other=0.0)
            tl.store(statistics + index, dot, mask=valid)
            tl.store(statistics + count + index, t, mask=valid)
            tl.store(statistics + 2 * count + index, s, mask=valid)
            direction += tl.where(valid, one_less_cosine(dot, t, s), 0.0)
        else:
            direction += tl.load(parts + 2 * index, mask=valid, other=0.0)
            value += tl.load(parts + 2 * index + 1, mask=valid, other=0.0)
    own = tl.sum(direction, 0) / vectors + value_weight * (tl.sum(value, 0) / numbers)
    tl.store(total, tl.load(total) + own)


IMAGES = Tuned(
    loss_images_kernel, {"any": (config(4, BLOCK=512), config(8, BLOCK=2048), config(8, BLOCK=1024))}, key=("numbers",)
)
PIXELS_OF = Tuned(
    loss_pixels_kernel,
    {"any": (config(4, BLOCK_P=PIXELS, BLOCK_C=64), config(4, BLOCK_P=PIXELS, BLOCK_C=32))},
    key=("channels", "channel_stride", "problem"),
)
# It adds to what it reads, so that it has one configuration.
TOTAL = Tuned(loss_total_kernel, {"any": (config(4, BLOCK=256),)}, key=())


@operator
def distillation_loss(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.distillation_loss`; also return the statistics that the reference describes."""
    levels, flat = Levels(a.teacher, a.student), a.direction == "flat"
    counts = _vectors(levels, flat)
    statistics = floats((3 * sum(counts),), a.teacher[0])
    output = floats((), a.teacher[0]).zero_()
    by_image, by_pixel, add = IMAGES(), PIXELS_OF(), TOTAL()
    for level, (t, s) in enumerate(zip(levels.teacher, levels.student, strict=True)):
        images, numbers = t.shape[0], t.shape[1] * t.shape[2] * t.shape[3]
        if images == 0:
            continue
        own = statistics[3 * sum(counts[:level]) : 3 * sum(counts[: level + 1])]
        if flat:
            splits = max(1, min(MAX_SPLITS, numbers // SPLIT))
            parts = floats((images, splits, 4), t)
            wrap_triton(by_image)[(images, splits)](
                t, s, parts, numbers, splits, WHOLE=numbers % (CHUNK_BYTES // t.element_size()) == 0
            )
            blocks = images
        else:
            own_sizes, splits = sizes(levels, level), 1
            blocks = triton.cdiv(own_sizes[0], PIXELS)
            parts = floats((blocks, 2), t)
            wrap_triton(by_pixel)[(blocks,)](
                t, s, own, parts, *own_sizes, bucket(own_sizes[0]), **layout(levels, level)
            )
        wrap_triton(add)[(1,)](
            parts, own, output, blocks, splits, counts[level], a.teacher[level].numel(), a.value_weight, IMAGES=flat
        )
    return output, statistics


@operator
def distillation_loss_backward(grad: Tensor, statistics: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    levels, flat = Levels(a.teacher, a.student), a.direction == "flat"
    counts = _vectors(levels, flat)
    sums = [part.view(3, -1) for part in statistics.split([3 * count for count in counts])]
    return pair_gradients(
        levels, [grad.float().contiguous()] * len(counts), sums, [1 / max(count, 1) for count in counts],
        [a.value_weight / max(level.numel(), 1) for level in a.teacher], flat, needs,
        [*a.teacher, *a.student],
    )  # fmt: skip


def _vectors(levels: Levels, flat: bool) -> list[int]:
    """Return the number of cosines of each level."""
    return [level.shape[0] * (1 if flat else level.shape[2] * level.shape[3]) for level in levels.teacher]

"""Bilinear sampling at offset positions, and its gradient, within kernels: what the deformable operators share.

Positions are float32. A neighbour outside the image is not read, and has a weight of 0; a position that is not a number
gives samples that are none.
"""

import triton
import triton.language as tl


@triton.jit
def chunks(count, like: tl.constexpr):
    """The count, which the compiler then knows to be a multiple of the numbers in 16 bytes (ops/layout.py).

    That is what lets it load 16 bytes at a time, with one address for all of them. ``like``: the type of a pointer.
    """
    unit: tl.constexpr = 128 // like.element_ty.primitive_bitwidth
    return count // unit * unit


@triton.jit
def place_of(index, pixels, rows, columns):
    """Image, and row and column of the output, of numbered pixels."""
    valid = index < pixels
    image = index // (rows * columns)
    place = index - image * (rows * columns)
    row = place // columns
    return valid, image, place, row, place - row * columns


@triton.jit
def axis(position, size):
    """The neighbour before a position, as a whole number, and how far the position is beyond it."""
    # Positions this far out have no neighbour inside; clamping keeps the conversion to an integer defined.
    known = tl.where(position == position, position, -2.0)
    near = tl.minimum(tl.maximum(known, -2.0), size + 1.0)
    before = tl.floor(near)
    return before.to(tl.int32), tl.where(position == position, near - before, position)


@triton.jit
def channel_at(image, place, channel, image_stride, channel_stride, pixel_stride):
    """Return the address of a channel of an offset or a mask, for each pixel."""
    pixel = image.to(tl.int64) * image_stride + place.to(tl.int64) * pixel_stride
    return pixel + tl.cast(channel, tl.int64) * channel_stride


@triton.jit
def modulation(mask, at, valid, MASK: tl.constexpr):
    """The mask of each pixel; one where there is none."""
    if MASK:
        return tl.load(mask + at, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.full(valid.shape, 1.0, tl.float32)


@triton.jit
def sampling_position(
    offset_y, offset_x, tap, kernel_columns, row, column,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width,
):  # fmt: skip
    """Return where a tap samples: the neighbours above and left, and the shares of those below and right.

    Kernels load ``offset_y`` and ``offset_x`` themselves: torch.compile takes a pointer that is passed on for one that
    results point into.
    """
    y = row * stride_y - padding_y + tap // kernel_columns * dilation_y
    x = column * stride_x - padding_x + tap % kernel_columns * dilation_x
    top, down = axis(y.to(tl.float32) + offset_y.to(tl.float32), height)
    left, right = axis(x.to(tl.float32) + offset_x.to(tl.float32), width)
    return top, left, down, right


@triton.jit
def neighbour(top, left, down, right, valid, base, height, width, BELOW: tl.constexpr, BESIDE: tl.constexpr):
    """One of the four neighbours: its pixel, whether it is to be read, and its weight along y and along x."""
    row, column = top + BELOW, left + BESIDE
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    vertical = down if BELOW else 1 - down
    horizontal = right if BESIDE else 1 - right
    pixel = (base + row * width + column).to(tl.int64)
    # Both weights, so that each derivative is 0 outside too.
    share = inside.to(tl.float32)
    return pixel, inside & valid, vertical * share, horizontal * share


@triton.jit
def read(input, pixel, wanted, stride, channel, within):
    """Channels of pixels, (pixels, channels), in float32."""
    at = pixel[:, None] * stride + channel[None, :]
    return tl.load(input + at, mask=wanted[:, None] & within[None, :], other=0.0).to(tl.float32)


@triton.jit
def sample(input, stride, channel, within, top, left, down, right, valid, base, height, width, scale):
    """Samples of channels, (pixels, channels), times each pixel's scale, in float32."""
    pixel, wanted, v, h = neighbour(top, left, down, right, valid, base, height, width, 0, 0)
    total = read(input, pixel, wanted, stride, channel, within) * (v * h * scale)[:, None]
    pixel, wanted, v, h = neighbour(top, left, down, right, valid, base, height, width, 0, 1)
    total += read(input, pixel, wanted, stride, channel, within) * (v * h * scale)[:, None]
    pixel, wanted, v, h = neighbour(top, left, down, right, valid, base, height, width, 1, 0)
    total += read(input, pixel, wanted, stride, channel, within) * (v * h * scale)[:, None]
    pixel, wanted, v, h = neighbour(top, left, down, right, valid, base, height, width, 1, 1)
    total += read(input, pixel, wanted, stride, channel, within) * (v * h * scale)[:, None]
    return total


@triton.jit
def scatter(
    grad, input, grad_input, factor, stride, channel, within,
    top, left, down, right, valid, base, height, width, scale,
    BELOW: tl.constexpr, BESIDE: tl.constexpr, GRAD_INPUT: tl.constexpr, BY_MOVES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds the samples' gradient to one neighbour, and gives its product with that neighbour, summed over channels.

    ``factor``: that whole numbers stand for, where sums are EXACT.
    """
    pixel, wanted, v, h = neighbour(top, left, down, right, valid, base, height, width, BELOW, BESIDE)
    dot = tl.zeros_like(down)
    if BY_MOVES:
        dot = tl.sum(read(input, pixel, wanted, stride, channel, within) * grad, 1)
    if GRAD_INPUT:
        at = pixel[:, None] * stride + channel[None, :]
        part = grad * (v * h * scale)[:, None]
        to = wanted[:, None] & within[None, :]
        if EXACT:
            tl.atomic_add(grad_input + at, tl.floor(part * factor + 0.5).to(tl.int64), mask=to, sem="relaxed")
        else:
            tl.atomic_add(grad_input + at, part, mask=to, sem="relaxed")
    return dot


@triton.jit
def by_position(dots, top, left, down, right, valid, height, width, BELOW: tl.constexpr, BESIDE: tl.constexpr):
    """What one neighbour adds to the gradients by y, by x and by the mask; ``dots`` as from :func:`scatter`."""
    _, _, v, h = neighbour(top, left, down, right, valid, 0, height, width, BELOW, BESIDE)
    sign_y: tl.constexpr = 1.0 if BELOW else -1.0
    sign_x: tl.constexpr = 1.0 if BESIDE else -1.0
    return dots * h * sign_y, dots * v * sign_x, dots * v * h


@triton.jit
def write_offset_grads(
    grad_offset, grad_mask, first, second, third, fourth, top, left, down, right, valid, image, place, plane,
    height, width, scale, slot, slots, GRAD_OFFSET: tl.constexpr, GRAD_MASK: tl.constexpr,
):  # fmt: skip
    """The gradients by offset and mask, channels first, of the dots with the four neighbours, row by row."""
    y0, x0, m0 = by_position(first, top, left, down, right, valid, height, width, 0, 0)
    y1, x1, m1 = by_position(second, top, left, down, right, valid, height, width, 0, 1)
    y2, x2, m2 = by_position(third, top, left, down, right, valid, height, width, 1, 0)
    y3, x3, m3 = by_position(fourth, top, left, down, right, valid, height, width, 1, 1)
    at = (image.to(tl.int64) * slots + slot) * plane + place
    if GRAD_OFFSET:
        to = at * 2 - place
        tl.store(grad_offset + to, (y0 + y1 + y2 + y3) * scale, mask=valid)
        tl.store(grad_offset + to + plane, (x0 + x1 + x2 + x3) * scale, mask=valid)
    if GRAD_MASK:
        tl.store(grad_mask + at, m0 + m1 + m2 + m3, mask=valid)

"""The package's operators in operators that every run-time has: what an exported graph is made of.

With nothing that depends on how many images there are; equal to the references within rounding. Run-times multiply
matrices well, so the search in a window is made of products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from bkd_fast.ops import anomaly_map
from bkd_fast.ops.anomaly_map import reference
from bkd_fast.ops.grid_means.reference import means_of_cells
from bkd_fast.ops.join_levels.reference import joined
from bkd_fast.ops.local_match.reference import displacements
from bkd_fast.ops.match_supports import Arguments as Matches
from bkd_fast.ops.match_supports import in_turn
from bkd_fast.ops.memory_attention.reference import memory_attention_weights
from bkd_fast.ops.nearest_rows.reference import nearest
from bkd_fast.ops.neighbor_regression.reference import combined
from bkd_fast.ops.neighbor_residual.reference import apart
from bkd_fast.ops.registration import wide
from bkd_fast.ops.select_matches.reference import positions
from bkd_fast.ops.standardize.reference import standardized
from bkd_fast.ops.top_mean.reference import mean_of_largest


def plain(program: ExportedProgram, *, deform_conv: bool = False) -> ExportedProgram:
    """The same program without this package's operators.

    Args:
        deform_conv: keep ``modulated_deform_conv2d``, and make the gather one too, for run-times that have such an
            operator; otherwise samples are taken by ``grid_sample``.
    """
    ops = torch.ops.bkd_fast
    made = {
        ops.sparse_memory_attention.default: attention,
        ops.cosine_anomaly_map.default: _anomaly_map,
        ops.grid_means.default: means_of_cells,
        ops.join_levels.default: joined,
        ops.local_match.default: match_by_products,
        ops.match_supports.default: _matched,
        ops.nearest_rows.default: _nearest,
        ops.neighbor_regression.default: combined,
        ops.neighbor_residual.default: apart,
        ops.select_matches.default: _selected,
        ops.standardize.default: standardized,
        ops.top_mean.default: mean_of_largest,
        ops.modulated_deform_gather.default: gather_by_deform_conv if deform_conv else gather_by_grid_sample,
    }
    if not deform_conv:
        made[ops.modulated_deform_conv2d.default] = conv_by_grid_sample
    return program.run_decompositions(made)


def _selected(distance: Tensor, displacement: Tensor, shots: Tensor, count: int) -> Tensor:
    # A sort that keeps the order of equal distances is not to be had everywhere.
    return positions(displacement, shots, distance.topk(count, dim=1, largest=False).indices)


def _matched(*arguments: Any) -> list[Tensor]:
    return in_turn(Matches(*arguments), match_by_products, _selected, combined)


def _nearest(query: Tensor, bank: Tensor, count: int, *_: Tensor | None) -> Tensor:
    return nearest(query, bank, count)


def _anomaly_map(*arguments: Any) -> Tensor:
    return reference.cosine_anomaly_map(anomaly_map.Arguments(*arguments))


def match_by_products(query: Tensor, support: Tensor, shots: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.local_match`, of shots that exist: |q - s|^2 = |q|^2 + |s|^2 - 2 q s.

    A block is a few adjacent pixels of a row of the support, and those around them. It is multiplied by the pixels of
    the query whose windows reach into that row, and the products inside of the windows are kept.
    """
    channels, height, width = query.shape[1:]
    dtype, side, size = wide(query), 2 * radius + 1, max(8, 2 * radius)
    blocks = (width + size - 1) // size
    own = query.permute(0, 2, 3, 1).to(dtype)

    # Of each block B the pixels from -radius to size + radius, of all shots: (N, H, B, size + 2 radius, k, C).
    y = torch.arange(height, device=query.device)[:, None, None, None]
    x = torch.arange(blocks, device=query.device)[:, None] * size + torch.arange(
        -radius, size + radius, device=query.device
    )
    x = x.unsqueeze(2)
    pixels = (shots[:, None, None, None, :] * height + y) * width + x.clamp(0, width - 1)
    images = support.permute(0, 2, 3, 1).flatten(0, 2)[pixels.flatten()].unflatten(0, pixels.shape).to(dtype)
    squares = (images * images).sum(5).masked_fill((x < 0) | (x >= width), torch.inf)
    squares = F.pad(squares, [0, 0, 0, 0, 0, 0, radius, radius], value=torch.inf)

    # Row s of those around support row y is the query's row y + s - radius: a displacement of radius - s.
    rows = F.pad(own, [0, 0, 0, blocks * size - width, radius, radius]).unflatten(2, (blocks, size))
    around = torch.cat([rows[:, s : s + height] for s in range(side)], 3)  # (N, H, B, side * size, C)
    products = around @ images.flatten(3, 4).transpose(3, 4)
    # Pixel x meets columns x to x + 2 radius. Rows that are longer by one column bring these below each other.
    products = products.view(-1, height, blocks, side, size * (size + 2 * radius), shots.shape[1])
    products = F.pad(products, [0, 0, 0, size]).unflatten(4, (size, size + side))[:, :, :, :, :, :side]
    products = F.pad(-2 * products, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, radius, radius])

    moves = displacements(radius)
    candidates = torch.stack(
        [
            squares[:, radius + dy : radius + dy + height, :, radius + dx : radius + dx + size]
            + products[:, radius + dy : radius + dy + height, :, radius - dy, :, radius + dx]
            for dy, dx in moves
        ],
        4,
    )  # (N, H, B, size, side * side, k)
    candidates = candidates.masked_fill(candidates.isnan(), torch.inf).flatten(2, 3)[:, :, :width]  # NaN loses
    distance = candidates.amin(3) + own.square().sum(3, keepdim=True)
    distance = distance.masked_fill(distance < 0, 0) / channels  # rounding; a NaN stays, unlike where a run-time clamps
    # The moves as numbers of the graph: a tensor made of a list cannot be traced here.
    place = torch.arange(side * side, device=query.device)
    numbers = torch.stack([place // side - radius, place % side - radius], 1)
    order = (numbers.square().sum(1) * len(moves) + place).argsort()
    displacement = numbers[order].to(dtype)[candidates.argmin(3)]
    return distance.permute(0, 3, 1, 2), displacement.permute(0, 3, 4, 1, 2)


def gather_by_grid_sample(
    projected: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_gather`: a ``grid_sample`` for each tap."""
    samples = _samples(projected, offset, mask, kernel_size, stride, padding, dilation)
    total = samples[0]
    for part in samples[1:]:
        total = total + part
    return total


def gather_by_deform_conv(
    projected: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The same as a 1 x 1 deformable convolution: each tap is an offset group, and the weights add them up."""
    taps = offset.shape[1] // 2
    channels = projected.shape[1] // taps
    place = torch.arange(taps, device=offset.device) % (kernel_size[0] * kernel_size[1])
    start = [place // kernel_size[1] * dilation[0] - padding[0], place % kernel_size[1] * dilation[1] - padding[1]]
    moves = offset + torch.stack(start, 1).to(offset.dtype).view(1, -1, 1, 1)
    weight = torch.eye(channels, device=offset.device, dtype=projected.dtype).repeat(1, taps)[:, :, None, None]
    if projected.shape[0] == 1:
        projected = projected.expand(offset.shape[0], -1, -1, -1)
    return torch.ops.bkd_fast.modulated_deform_conv2d(projected, moves, weight, None, stride, [0, 0], [1, 1], mask)


def conv_by_grid_sample(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`: the samples of all taps, and a 1 x 1 convolution of them."""
    taps = weight.shape[2] * weight.shape[3]
    groups, slots = input.shape[1] // weight.shape[1], offset.shape[1] // (2 * taps)
    # Samples by (tap, channel), each offset group's channels by its own offsets.
    columns = []
    for slot, part in enumerate(input.chunk(slots, 1)):
        moves = offset[:, 2 * slot * taps : 2 * (slot + 1) * taps]
        scale = None if mask is None else mask[:, slot * taps : (slot + 1) * taps]
        table = part.repeat(1, taps, 1, 1)
        columns.append(torch.stack(_samples(table, moves, scale, list(weight.shape[2:]), stride, padding, dilation), 2))
    samples = torch.cat(columns, 1).flatten(1, 2)  # (N, C K, Ho, Wo), the channels of a group side by side
    return F.conv2d(samples, weight.flatten(1)[:, :, None, None], bias, groups=groups)


def attention(query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`: the weights of all queries at once."""
    return memory_attention_weights(query, memory, threshold, temperature, renormalize) @ memory


def _samples(
    table: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """Of each tap its own channels of the table, sampled and masked: (N, C, Ho, Wo)."""
    taps = offset.shape[1] // 2
    height, width = table.shape[2:]
    rows = torch.arange(offset.shape[2], device=offset.device) * stride[0] - padding[0]
    columns = torch.arange(offset.shape[3], device=offset.device) * stride[1] - padding[1]
    found = []
    for tap, part in enumerate(table.chunk(taps, 1)):
        place = tap % (kernel_size[0] * kernel_size[1])
        y = offset[:, 2 * tap] + (rows + place // kernel_size[1] * dilation[0]).unsqueeze(1)
        x = offset[:, 2 * tap + 1] + (columns + place % kernel_size[1] * dilation[1])
        # grid_sample's positions are -1 and 1 at the outer edges of the first and last pixels.
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
        if part.shape[0] == 1:
            part = part.expand(offset.shape[0], -1, -1, -1)
        sampled = F.grid_sample(part, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        found.append(sampled if mask is None else sampled * mask[:, tap : tap + 1])
    return found

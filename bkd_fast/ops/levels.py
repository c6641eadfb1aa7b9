"""Levels of a teacher and its students for GPU kernels: in one dtype and layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bkd_fast.ops.layout import CHUNK_BYTES, whole_chunks
from bkd_fast.ops.registration import memory_format


class Levels:
    """Dense levels of one dtype. Students have their teacher's layout, channels-last ones whole chunks of 16 bytes.

    Attributes:
        channels: of each level, without padding.
    """

    def __init__(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        finish: Callable[[Tensor], Tensor] = lambda level: level,
    ) -> None:
        """Convert the levels.

        Args:
            finish: applied to each converted level.
        """
        tensors = [*teacher, *student]
        dtype = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
        formats = [memory_format(level) for level in teacher]
        self.teacher = [finish(_dense(level, dtype, layout)) for level, layout in zip(teacher, formats, strict=True)]
        self.student = [
            finish(_dense(level, dtype, formats[index % len(teacher)])) for index, level in enumerate(student)
        ]
        self.channels = [level.shape[1] for level in teacher]

    def buffers(self, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """Return buffers for the gradients of teacher and students; no elements where they are not needed."""
        buffers = [
            torch.empty_like(level) if need else level.new_empty(0)
            for level, need in zip([*self.teacher, *self.student], needs, strict=True)
        ]
        return buffers[: len(self.teacher)], buffers[len(self.teacher) :]

    def results(self, gradients: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        """Return the gradients in the dtypes of the tensors, without padding."""
        return [
            grad[:, : tensor.shape[1]].to(tensor.dtype) if need else tensor.new_empty(0)
            for grad, tensor, need in zip(gradients, tensors, needs, strict=True)
        ]


def _dense(level: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    level = level.to(dtype)
    if layout == torch.channels_last and level.shape[1] * level.element_size() % CHUNK_BYTES:
        level = whole_chunks(level, 1, level.shape[1])
    return level.contiguous(memory_format=layout)

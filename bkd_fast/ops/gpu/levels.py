"""Levels of a teacher and its students as kernels take them: alike in type and layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bkd_fast.ops.gpu.layout import CHUNK_BYTES, whole_chunks
from bkd_fast.ops.registration import memory_format


class Levels:
    """Dense levels of one type; students lie as their teacher, channels-last ones in whole chunks of 16 bytes.

    ``channels``: of each level, without those that only fill chunks.
    """

    def __init__(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        placed: Callable[[Tensor], Tensor] = lambda level: level,
    ) -> None:
        """
        Args:
            placed: what is done to each level at last.
        """
        tensors = [*teacher, *student]
        dtype = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
        formats = [memory_format(level) for level in teacher]
        self.teacher = [placed(_dense(level, dtype, layout)) for level, layout in zip(teacher, formats, strict=True)]
        self.student = [
            placed(_dense(level, dtype, formats[index % len(teacher)])) for index, level in enumerate(student)
        ]
        self.channels = [level.shape[1] for level in teacher]

    def room(self, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """For the gradients of teacher and students, laid out as they are; no elements where they are not needed."""
        found = [
            torch.empty_like(level) if need else level.new_empty(0)
            for level, need in zip([*self.teacher, *self.student], needs, strict=True)
        ]
        return found[: len(self.teacher)], found[len(self.teacher) :]

    def results(self, gradients: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        """Gradients in the types of the tensors, without what fills chunks."""
        return [
            found[:, : tensor.shape[1]].to(tensor.dtype) if need else tensor.new_empty(0)
            for found, tensor, need in zip(gradients, tensors, needs, strict=True)
        ]


def _dense(level: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    level = level.to(dtype)
    if layout == torch.channels_last and level.shape[1] * level.element_size() % CHUNK_BYTES:
        level = whole_chunks(level, 1, level.shape[1])
    return level.contiguous(memory_format=layout)

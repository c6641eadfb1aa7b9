"""Count the kernels that one image launches on CUDA, without a device: python benchmarks/launches.py [--csv FILE].

The model runs on fake CUDA tensors, which have shapes and no data, with its teacher's convolutions fused as a detector
fuses them. Every PyTorch operation that is not a view counts as one kernel, or as KERNELS says; the package's own CUDA
operators count as OWN says. That is a lower bound: PyTorch launches several kernels for some operations. ``gpu.py
--part 2`` counts what a device really runs.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bkd_fast.benchmark.model import TEACHERS
from bkd_fast.benchmark.parts import PARTS, in_parts
from bkd_fast.benchmark.results import write_lines
from bkd_fast.config import BKDConfig
from bkd_fast.inference.fusing import fuse_teacher
from bkd_fast.model import BKD
from bkd_fast.ops import cuda_common, native

# Kernels of a PyTorch operation where they are more than one: padding fills, then copies.
KERNELS = {"constant_pad_nd": 2, "eye": 2}
# PyTorch selects the largest values of a row this long by a radix select, which launches about this many kernels.
LONG_ROW, PASSES = 20_000, 15
# Kernels of the package's operators on CUDA.
OWN = {
    "anomaly_map": lambda *_: 2,
    "memory_attention": lambda *_: 3,
}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
# cuDNN's fused convolutions, a kernel each, and where their arguments after input and weight begin.
FUSED = {"cudnn_convolution_relu": 2, "cudnn_convolution_add_relu": 4}
STUBS = "bkd_fast_counted"
COLUMNS = ("teacher", "part", "operation", "kernels")


class Counter(TorchDispatchMode):
    """Count kernels by (part, operation) while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[tuple[str, str]] = collections.Counter()
        self.parts = ["other"]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.parts.append(name)
        yield
        self.parts.pop()

    def add(self, operation: str, kernels: int) -> None:
        self.kernels[self.parts[-1], operation] += kernels

    def own(self, name: str) -> Callable[..., None]:
        """A kernel of the package that does nothing but count: its caller has made the results it would fill."""
        return lambda *arguments: self.add(f"bkd_fast {name}", OWN.get(name, lambda *_: 1)(*arguments))

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if operator.namespace == "bkd_fast":  # an opaque call: what it is made of counts
            with self:
                return OPDEFS[f"bkd_fast::{operator._opname}"]._init_fn(*arguments, **options)
        if operator.namespace != "aten":
            return operator(*arguments, **options)
        if operator._opname in FUSED:  # they have no fake kernels: results are as those of a plain convolution
            self.add(operator._opname, 1)
            bias, stride, padding, dilation, groups = arguments[FUSED[operator._opname] :]
            return torch.ops.aten.convolution(*arguments[:2], bias, stride, padding, dilation, False, [0, 0], groups)
        with self:
            result = operator.decompose(*arguments, **options)
        if result is NotImplemented:
            result = operator(*arguments, **options)
            if not operator.is_view and operator._opname not in NO_KERNEL:
                self.add(operator._opname, kernels_of(operator._opname, arguments))
        return result


def kernels_of(name: str, arguments: Sequence[Any]) -> int:
    """Return the minimum number of kernels that PyTorch launches for an operation."""
    if name == "convolution":  # a separate kernel adds the bias
        return 1 + (arguments[2] is not None)
    if name == "topk" and arguments[0].shape[-1] >= LONG_ROW:
        return PASSES
    return KERNELS.get(name, 1)


def count(label: str, images: int = 1) -> dict[tuple[str, str], int]:
    """Return kernels by (part, operation) of a detector's network: the default model with a teacher of TEACHERS."""
    config = BKDConfig().with_changes({"teacher.name": TEACHERS[label], "teacher.weights": "none"})
    model, counter = BKD(config, weights=None).eval(), Counter()
    fuse_teacher(model.teacher, torch.rand(1, 3, 64, 64))
    with ExitStack() as stack:
        stack.enter_context(patch.dict(native.DEVICES, cuda=native.CUDA))
        stack.enter_context(patch.object(cuda_common, "NAMESPACE", STUBS))
        stack.enter_context(patch.object(torch.ops, STUBS, Stubs(counter), create=True))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", lambda _: 0))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        as_fake(model)
        model.prepare()
        bank, image = (
            torch.rand(number, 3, *config.teacher.size, device="cuda") for number in (config.support.bank_size, images)
        )
        with counter:  # which knows what cuDNN's fused convolutions return
            support = model.make_support(model.support_levels(bank))
        counter.kernels.clear()
        stack.enter_context(in_parts(model, counter.part))
        with counter:
            model.predict(image, support)
    return dict(counter.kernels)


class Stubs:
    """What ``torch.ops.bkd_fast_cuda`` is replaced by."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self.counter.own(name)


def as_fake(model: nn.Module) -> None:
    """Replace the tensors of a model by fake CUDA tensors; call it where a FakeTensorMode is active."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake, value.requires_grad) if tensors is module._parameters else fake


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="file to write")
    arguments = parser.parse_args()
    counts = {label: count(label) for label in TEACHERS}
    print(table(counts))
    if arguments.csv:
        rows = [
            dict(zip(COLUMNS, (TEACHERS[label], *key, str(kernels)), strict=True))
            for label, own in counts.items()
            for key, kernels in sorted(own.items())
        ]
        write_lines(rows, arguments.csv)


def table(counts: Mapping[str, Mapping[tuple[str, str], int]]) -> str:
    """Markdown: kernels of one image by part and teacher."""
    rows = [["part", *(TEACHERS[label] for label in counts)], ["---"] * (len(counts) + 1)]
    for part in (*PARTS, "other"):
        sums = [sum(k for (name, _), k in own.items() if name == part) for own in counts.values()]
        if any(sums):
            rows.append([part, *map(str, sums)])
    rows.append(["sum", *(f"**{sum(own.values())}**" for own in counts.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()

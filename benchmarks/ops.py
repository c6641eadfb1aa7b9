"""Every operator against its peers: python benchmarks/ops.py [--quick] [--scaling] [--only OP] [--csv FILE].

--scaling measures the package's own backends alone, at one thread and at all of them, in turns.
--device cuda times kernels behind one another, without their launches; --dtype is of all tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from options import own_alone, parser, run
from peers import deform_conv_peers

from bkd_fast.benchmark.harness import Case
from bkd_fast.benchmark.operators import FULL, OPERATORS, QUICK, SIZE, cases
from bkd_fast.ops.anomaly_map import Arguments
from bkd_fast.ops.anomaly_map.reference import cosine_anomaly_map


def main() -> None:
    arguments = parser(__doc__, tuple(OPERATORS), dtypes=True)
    scope = (QUICK if arguments.quick else FULL)._replace(dtype=getattr(torch, arguments.dtype))
    if arguments.device == "cuda":
        # Products of float32 are exact in every provider, or the results could not be compared.
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    found = cases(scope, arguments.device, arguments.only)
    if arguments.scaling:
        run(map(own_alone, found), arguments, threads=(1, torch.get_num_threads()))
    else:
        run(_with_peers(found, compiled=not arguments.quick), arguments)


def _with_peers(found: Iterator[Case], *, compiled: bool) -> Iterator[Case]:
    for case in found:
        peers = {}
        plain = (case.device, case.dtype) == ("cpu", torch.float32)
        if case.op == "modulated_deform_conv2d" and case.what == "forward" and plain:
            peers = deform_conv_peers(*case.inputs)
        elif case.op == "cosine_anomaly_map" and compiled:
            torch.compiler.reset()  # or it would generalise over the shapes of the cases before
            call = torch.compile(cosine_anomaly_map, dynamic=False)
            teacher, student = list(case.inputs[:3]), list(case.inputs[3:])
            settings = ([SIZE, SIZE], "product", 4.0, [1.0] * 3, [1.0] * 3, False, 0.0)
            peers = {"torch.compile": lambda c=call, t=teacher, s=student, a=settings: c(Arguments(t, s, *a))}
        yield case._replace(providers={**case.providers, **peers})


if __name__ == "__main__":
    main()

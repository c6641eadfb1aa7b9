"""Every operator against its peers: python benchmarks/ops.py [--quick] [--scaling] [--only OP] [--csv FILE].

--scaling measures the package's own backends alone, with one thread and with all of them, in turns.
--device cuda times kernels back to back, without their launches. --dtype is the type of all tensors; --tf32 lets CUDA
round the factors of float32 products to TF32, as the detector does by default in its convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from options import fp32_precision, parse, parser, run
from peers import deform_conv_peers

from bkd_fast.benchmark.harness import Case
from bkd_fast.benchmark.operators import FULL, OPERATORS, QUICK, SIZE, cases
from bkd_fast.ops.anomaly_map import Arguments
from bkd_fast.ops.anomaly_map.reference import cosine_anomaly_map

DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    made = parser(__doc__, tuple(OPERATORS))
    made.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of all tensors (default: %(default)s)")
    made.add_argument("--tf32", action="store_true", help="float32 products in TF32 (--device cuda)")
    arguments = parse(made)
    if arguments.tf32 and (arguments.device, arguments.dtype) != ("cuda", "float32"):
        made.error("--tf32 is for --device cuda and --dtype float32")
    scope = (QUICK if arguments.quick else FULL)._replace(dtype=getattr(torch, arguments.dtype), tf32=arguments.tf32)
    # Without --tf32 products are exact in every provider, so that results can be compared to float32's last digits.
    with fp32_precision("tf32" if arguments.tf32 else "ieee"):
        run(with_peers(cases(scope, arguments.device, arguments.only), compiled=not arguments.quick), arguments)


def with_peers(own: Iterator[Case], *, compiled: bool) -> Iterator[Case]:
    """Add ONNX Runtime, OpenVINO and torch.compile to the cases that they have."""
    for case in own:
        peers = {}
        plain = (case.device, case.dtype) == ("cpu", "float32")
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

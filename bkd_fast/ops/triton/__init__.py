"""The operators on Triton kernels, for CUDA devices where no compiler was when the package was installed.

float32, float16 and bfloat16. With TRITON_INTERPRET=1 they run on the CPU too, in Triton's interpreter, which is slow
and wrong for bfloat16.
"""

import torch

from bkd_fast.ops.triton.anomaly_map import cosine_anomaly_map, cosine_anomaly_map_backward
from bkd_fast.ops.triton.deform_conv import modulated_deform_conv2d
from bkd_fast.ops.triton.deform_conv_backward import modulated_deform_conv2d_backward
from bkd_fast.ops.triton.deform_gather import modulated_deform_gather, modulated_deform_gather_backward
from bkd_fast.ops.triton.distillation_loss import distillation_loss, distillation_loss_backward
from bkd_fast.ops.triton.launching import INTERPRETED
from bkd_fast.ops.triton.local_match import local_match
from bkd_fast.ops.triton.memory_attention import sparse_memory_attention, sparse_memory_attention_backward

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

__all__ = [
    "DEVICES",
    "DTYPES",
    "cosine_anomaly_map",
    "cosine_anomaly_map_backward",
    "distillation_loss",
    "distillation_loss_backward",
    "local_match",
    "modulated_deform_conv2d",
    "modulated_deform_conv2d_backward",
    "modulated_deform_gather",
    "modulated_deform_gather_backward",
    "sparse_memory_attention",
    "sparse_memory_attention_backward",
]

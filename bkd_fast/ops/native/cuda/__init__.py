"""The operators on CUDA kernels: lays arguments out as the kernels take them, and gives them results to fill in.

float32, float16 and bfloat16. Nothing here waits for the device.
"""

import torch

from bkd_fast.ops.native.cuda.anomaly_map import cosine_anomaly_map, cosine_anomaly_map_backward
from bkd_fast.ops.native.cuda.deform_conv import modulated_deform_conv2d, modulated_deform_conv2d_backward
from bkd_fast.ops.native.cuda.deform_gather import modulated_deform_gather, modulated_deform_gather_backward
from bkd_fast.ops.native.cuda.distillation_loss import distillation_loss, distillation_loss_backward
from bkd_fast.ops.native.cuda.local_match import local_match
from bkd_fast.ops.native.cuda.memory_attention import sparse_memory_attention, sparse_memory_attention_backward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

__all__ = [
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

"""The operators in plain PyTorch: what the kernels must compute."""

from bkd_fast.ops.reference.anomaly_map import (
    cosine_anomaly_map,
    cosine_anomaly_map_backward,
    fusion_backward,
    raised,
)
from bkd_fast.ops.reference.deform_conv import (
    modulated_deform_conv2d,
    modulated_deform_conv2d_backward,
    modulated_deform_gather,
    modulated_deform_gather_backward,
)
from bkd_fast.ops.reference.distillation_loss import distillation_loss, distillation_loss_backward
from bkd_fast.ops.reference.local_match import local_match, match
from bkd_fast.ops.reference.memory_attention import (
    memory_attention_weights,
    sparse_memory_attention,
    sparse_memory_attention_backward,
)

DEVICES = ("cpu", "cuda", "meta", "mps", "xpu")

__all__ = [
    "DEVICES",
    "cosine_anomaly_map",
    "cosine_anomaly_map_backward",
    "distillation_loss",
    "distillation_loss_backward",
    "fusion_backward",
    "local_match",
    "match",
    "memory_attention_weights",
    "modulated_deform_conv2d",
    "modulated_deform_conv2d_backward",
    "modulated_deform_gather",
    "modulated_deform_gather_backward",
    "raised",
    "sparse_memory_attention",
    "sparse_memory_attention_backward",
]

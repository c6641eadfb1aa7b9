"""The fused operators. Each is a folder of this package; see the section "Add an operator" of CONTRIBUTING.md."""

from bkd_fast.ops.anomaly_map import cosine_anomaly_map
from bkd_fast.ops.backend import backend, describe
from bkd_fast.ops.deform_conv import modulated_deform_conv2d
from bkd_fast.ops.deform_gather import modulated_deform_gather, project_support
from bkd_fast.ops.distillation_loss import distillation_loss
from bkd_fast.ops.local_match import local_match
from bkd_fast.ops.memory_attention import sparse_memory_attention
from bkd_fast.ops.module import DeformConv2d

__all__ = [
    "DeformConv2d",
    "backend",
    "cosine_anomaly_map",
    "describe",
    "distillation_loss",
    "local_match",
    "modulated_deform_conv2d",
    "modulated_deform_gather",
    "project_support",
    "sparse_memory_attention",
]

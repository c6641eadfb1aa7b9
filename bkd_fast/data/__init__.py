"""Images, data sets and the support set; :mod:`bkd_fast.data.demo` makes the built-in data."""

from bkd_fast.data.augment import MODES, augment
from bkd_fast.data.dataset import Category, ImageDataset, Sample, check_samples, find_categories, split_normals
from bkd_fast.data.image import (
    from_pil,
    image_files,
    infer_white,
    load_image,
    load_mask,
    resize_image,
    resize_mask,
    to_tensor,
)
from bkd_fast.data.support import draw_support, load_support, save_support
from bkd_fast.errors import ImageError

__all__ = [
    "MODES",
    "Category",
    "ImageDataset",
    "ImageError",
    "Sample",
    "augment",
    "check_samples",
    "draw_support",
    "find_categories",
    "from_pil",
    "image_files",
    "infer_white",
    "load_image",
    "load_mask",
    "load_support",
    "resize_image",
    "resize_mask",
    "save_support",
    "split_normals",
    "to_tensor",
]

"""Images, data sets and the support set; :mod:`bkd_fast.data.demo` makes the built-in data."""

from bkd_fast.data.dataset import (
    Category,
    FileRecord,
    ImageDataset,
    Sample,
    check_samples,
    file_records,
    find_categories,
    find_unified,
    image_files,
    split_normals,
    truth_of,
)
from bkd_fast.data.image import infer_white, load_image, resize_image, resize_mask, to_tensor
from bkd_fast.data.roi import fit_roi, load_roi, shrink_roi
from bkd_fast.data.support import draw_support, load_support

__all__ = [
    "Category",
    "FileRecord",
    "ImageDataset",
    "Sample",
    "check_samples",
    "draw_support",
    "file_records",
    "find_categories",
    "find_unified",
    "fit_roi",
    "image_files",
    "infer_white",
    "load_image",
    "load_roi",
    "load_support",
    "resize_image",
    "resize_mask",
    "shrink_roi",
    "split_normals",
    "to_tensor",
    "truth_of",
]

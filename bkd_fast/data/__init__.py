"""Images, data sets and the support set; :mod:`bkd_fast.data.demo` makes the built-in data."""

from bkd_fast.data.augment import augment
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
from bkd_fast.data.image import (
    from_pil,
    infer_white,
    load_image,
    load_mask,
    resize_image,
    resize_mask,
    to_tensor,
)
from bkd_fast.data.roi import fit_roi, load_roi, shrink_roi
from bkd_fast.data.support import draw_support, load_support, save_support
from bkd_fast.errors import ImageError

__all__ = [
    "Category",
    "FileRecord",
    "ImageDataset",
    "ImageError",
    "Sample",
    "augment",
    "check_samples",
    "draw_support",
    "file_records",
    "find_categories",
    "find_unified",
    "fit_roi",
    "from_pil",
    "image_files",
    "infer_white",
    "load_image",
    "load_mask",
    "load_roi",
    "load_support",
    "resize_image",
    "resize_mask",
    "save_support",
    "shrink_roi",
    "split_normals",
    "to_tensor",
    "truth_of",
]

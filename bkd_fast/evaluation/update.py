"""``bkd-fast update``: take further good images into a run, without training."""

from __future__ import annotations

from pathlib import Path

from bkd_fast.artifact import read_category
from bkd_fast.data import find_categories
from bkd_fast.errors import BKDError
from bkd_fast.files import locked
from bkd_fast.inference.detector import check_device
from bkd_fast.normals.update import add_normals


def update(
    run: str | Path,
    good: str | Path,
    *,
    device: str = "auto",
    skip_unreadable: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> str:
    """Take the good images of a folder into a run; see :func:`bkd_fast.normals.update.add_normals`.

    Args:
        run: folder of one trained category. It is replaced in one step: if the process is killed, it is whole, as it
            was or with the images.
        good: folder of good images; those that the run has already are left out.
        device: ``auto`` uses CUDA if there is a device.
        skip_unreadable: leave out images that cannot be decoded, with a warning that names them.
        dry_run: measure and warn, and leave the run as it is.
        progress: show a progress bar; None: in a terminal or a notebook, else a line now and then.

    Returns:
        A few lines for the user.

    Raises:
        BKDError: an unusable run, folder or image, or no image that is new; the run then stays as it was. Also:
            another process writes to the run.
    """
    run, good = Path(run), Path(good)
    read_category(run)  # its errors before a lock is taken
    chosen = check_device(device)
    category, *_ = find_categories(good)
    if not category.plain:
        raise BKDError(f"{good} is in MVTec AD's layout: expected a folder of good images, such as train/good")
    with locked(run):
        return add_normals(
            run,
            category.train,
            str(good.resolve()),
            chosen,
            skip_unreadable=skip_unreadable,
            dry_run=dry_run,
            progress=progress,
        )

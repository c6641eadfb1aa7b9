"""The report of a run: overlays on one fixed colour scale, and ``report.html``."""

from bkd_fast.evaluation.report.gallery import by_outcome
from bkd_fast.evaluation.report.inside import render_inside
from bkd_fast.evaluation.report.overlays import render_panel, write_overlay
from bkd_fast.evaluation.report.page import write_predictions, write_report
from bkd_fast.evaluation.report.records import CategoryReport, ImageRecord
from bkd_fast.inference.heat import HeatScale

__all__ = [
    "CategoryReport",
    "HeatScale",
    "ImageRecord",
    "by_outcome",
    "render_inside",
    "render_panel",
    "write_overlay",
    "write_predictions",
    "write_report",
]

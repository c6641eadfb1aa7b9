"""The methods that the paper compares BKD with, written small on the package's teacher, data and metrics."""

from comparators.differnet import differnet
from comparators.mkd import mkd
from comparators.us import us

__all__ = ["differnet", "mkd", "us"]

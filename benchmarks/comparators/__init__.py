"""The methods beside BKD in accuracy.py: anomalib's, and the comparators of the paper."""

from collections.abc import Callable
from typing import NamedTuple

from comparators import anomalib_methods
from comparators.common import Made
from comparators.differnet import differnet
from comparators.mkd import mkd
from comparators.us import us

BKD = "bkd"


class Method(NamedTuple):
    """A method as tables call it, and what trains it (None: BKD, which has a configuration instead)."""

    name: str
    make: Callable[..., Made] | None


METHODS: dict[str, Method] = {
    BKD: Method("BKD (bkd_fast)", None),
    "patchcore": Method("PatchCore (anomalib)", anomalib_methods.patchcore),
    "padim": Method("PaDiM (anomalib)", anomalib_methods.padim),
    "stfpm": Method("STFPM (anomalib)", anomalib_methods.stfpm),
    "rd": Method("ReverseDistillation (anomalib)", anomalib_methods.reverse_distillation),
    "efficientad": Method("EfficientAd (anomalib)", anomalib_methods.efficientad),
    "us": Method("US", us),
    "mkd": Method("MKD", mkd),
    "differnet": Method("DifferNet", differnet),
}

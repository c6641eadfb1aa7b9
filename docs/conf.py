"""Sphinx: python -m sphinx -W -b html docs docs/_build/html (or: make docs)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from bkd_fast.version import __version__

project = "bkd_fast"
author = "The bkd_fast developers"
version = release = __version__
extensions = [
    "config_fields",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
]
html_theme = "furo"
html_title = f"bkd_fast {__version__}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # docstrings say shapes and units; types are in the signature
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "training"}
doctest_global_setup = "import torch; torch.manual_seed(0)"

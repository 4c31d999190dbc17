"""Sphinx configuration of the documentation; ``make docs`` builds it with warnings as errors."""

import logging
import os
import warnings
from pathlib import Path

from lab.results.reference_pages import write_pages
from megatron_sorted import __version__

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", module="megatron|transformer_engine")  # of optional packages
logging.getLogger("megatron").setLevel(logging.WARNING)
write_pages(Path(__file__).parent / "reference")

project = "megatron_sorted"
author = "the authors of megatron_sorted"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"megatron_sorted {__version__}"
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # or a dataclass's attributes would be listed a second time
napoleon_custom_sections = ["Collective", ("Shapes", "params_style")]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

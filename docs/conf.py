"""Sphinx configuration: ``python -m sphinx -W -b html docs OUT``."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent)]

import mpillm  # noqa: E402

project = "mpillm"
author = "The mpillm developers"
release = mpillm.__version__
extensions = ["directives", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
html_theme = "alabaster"
html_theme_options = {"description": "Transformer language models as MPI programs", "page_width": "75em"}
exclude_patterns = ["_build"]

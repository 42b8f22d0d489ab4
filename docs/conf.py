"""The site: Sphinx with furo and myst. `make docs` builds it; the pages open from the file system, without network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # made_at_build, notebook_cells
sys.path.insert(0, str(Path(__file__).parents[1] / "projects"))  # evidence
sys.path.insert(0, str(Path(__file__).parents[1]))  # the bnext of this checkout, whichever is installed

import bnext

bnext.register()  # which makes the data sets known, and says how to get detectron2 where there is none

project = "bnext"
author = "the authors of bnext"
copyright = "the authors of bnext; Apache 2.0"
release = bnext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "made_at_build"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = "bnext"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]

# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The docs site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

from __future__ import annotations

import doctest
import os
import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

# Tutorials are small: one thread each, as TorchRL's workers have.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # times of day in outputs
warnings.filterwarnings("ignore")  # of the packages that tutorials import

import torchrl_rpd  # noqa: E402

project = "torchrl_rpd"
author = "the torchrl_rpd authors"
copyright = "the torchrl_rpd authors, MIT licence"
version = release = torchrl_rpd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "public_api",
    "repository",
]
templates_path = ["_templates"]
exclude_patterns = [
    "_build",
    "auto_tutorials/index.rst",  # tutorials.md lists them
    "auto_tutorials/sg_execution_times.rst",
    "sg_execution_times.rst",
    "tutorials/*",  # what sphinx-gallery reads; it writes auto_tutorials
]

# -- Markdown ------------------------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# -- Reference -----------------------------------------------------------------------
default_role = "literal"
add_module_names = False
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings name types, ranges and shapes
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Returns", "params_style")]
viewcode_line_numbers = True

# -- Doctests ------------------------------------------------------------------------
# tests/test_docs.py runs the docstrings' examples, tests/test_docs_site.py those of the
# pages; `-b doctest` runs the reference's as they stand on its pages, with these names.
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
doctest_global_setup = """
from torchrl_rpd import set_learner_threads
from torchrl_rpd.objectives import *
from torchrl_rpd.students import *
from torchrl_rpd.teachers.remote import *
"""

# -- Tutorials -----------------------------------------------------------------------
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "auto_tutorials",
    "filename_pattern": r"/\d_",
    "ignore_pattern": r"__init__|ruff",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "write_computation_times": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "capture_repr": (),
    "reset_modules": (),
    "copyfile_regex": "",
    "image_scrapers": ("matplotlib",),
    "image_srcset": ["2x"],
}

# -- HTML ----------------------------------------------------------------------------
html_theme = "furo"
html_title = "torchrl_rpd"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#b4430f"},
    "dark_css_variables": {"color-brand-primary": "#ff9a62"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

"""How the site is built: `make docs`, or `sphinx-build docs site`."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

from vecfield_diffusion import __version__

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import options  # noqa: E402  the module beside this file

project = "vecfield_diffusion"
author = "The vecfield_diffusion authors"
copyright = author  # the name that Sphinx reads
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"  # single backticks, in docstrings
add_module_names = False

html_theme = "furo"
html_title = "vecfield diffusion"
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Arguments", "params_style")]


def setup(app: Sphinx) -> None:
    """Writes the pages that are made of the configuration before the others are read."""
    app.connect("builder-inited", lambda _: options.write(HERE / "reference"))

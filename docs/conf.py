"""Sphinx settings of the manual. `make docs` builds it. Neither the build nor a page downloads anything."""

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import docstrings
import inventories

import atoll

project = "atoll"
version = release = atoll.__version__
copyright = "the authors of atoll"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
nitpicky = False
intersphinx_mapping = {
    name: (site, str(inventories.FOLDER / f"{name}.inv")) for name, site in inventories.SITES.items()
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "atoll"
html_static_path = ["_static"]
html_css_files = ["atoll.css"]
html_js_files = ["copy.js"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
smartquotes_action = "D"  # dashes only; quotes are not changed
pygments_style = "friendly"
pygments_dark_style = "github-dark"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = False  # the signature of `train` has more names than its source
autodoc_typehints = "none"  # docstrings describe arguments, with shapes and units
python_maximum_signature_line_length = 90


def formula(writer, node: nodes.Node) -> None:
    """Write a formula as MathML, which browsers render without a script and without other web pages."""
    block = isinstance(node, nodes.math_block)
    found = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div class="math">{found}</div>' if block else found)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.signature)

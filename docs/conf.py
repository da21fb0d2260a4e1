"""Configuration of Sphinx: `make docs` builds the pages of this folder into build/docs."""

from boxwright import __version__

project = "Boxwright"
author = "The Boxwright authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
smartquotes = False  # They would turn the two hyphens of `--option` into a dash.
exclude_patterns = ["benchmarks/measured"]
html_theme = "furo"
html_title = f"Boxwright {release}"
html_static_path = ["static"]
html_css_files = ["boxwright.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 4
myst_enable_extensions = ["linkify"]
myst_linkify_fuzzy_links = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

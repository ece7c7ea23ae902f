"""The web site, built by Sphinx with myst-nb and furo; ci/site runs it in the project's folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = html_title = "Training MNIST with PyTorch"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design", "pages"]
root_doc = "README"
include_patterns = ["*.md", "site/*.md", "ci/cluster/README.md", "benchmarks/README.md", "notebooks/*.ipynb"]
suppress_warnings = ["misc.highlighting_failure"]  # YAML and commands of the shell in cells of Python
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"

nb_execution_mode = "off"  # the pages' own outputs are shown
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the answer", "Hide the answer"
myst_heading_anchors = 4
myst_heading_slug_func = "pages.slug"
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_static_path = ["static", "../notebooks/support/digit.js", "weights.js"]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_favicon = "static/favicon.svg"
html_copy_source = html_show_sphinx = html_show_copyright = False

"""The documentation site: the pages of this folder, and an API reference from docstrings. ``make docs`` builds it."""

import importlib
import pkgutil
from pathlib import Path

from sphinx.ext.napoleon.docstring import GoogleDocstring

HERE = Path(__file__).parent
project = "mmsae"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "contents"
html_theme = "furo"
html_title = "mmsae"
html_show_copyright = html_show_sphinx = html_copy_source = False
html_static_path, html_css_files = ["static"], ["site.css"]
smartquotes_action = "qe"  # dashes stay as they are: headings name options
myst_heading_anchors = 4  # links to headings, as on code hosts
autodoc_inherit_docstrings = False  # those of other libraries are not ours
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of NamedTuples are members already
python_use_unqualified_type_names = True

suppress_warnings = ["ref.python"]  # a type named in an annotation may exist in two folders

# What is documented: what a package exports, and modules below it.
PACKAGES = {
    "mmsae": (),
    "mmsae.sae": ("fingerprint",),
    "mmsae.hosts": (),
    "mmsae.remote": ("places", "cache", "delivery", "hub", "folders"),
    "mmsae.shards": (),
    "mmsae.activations": (),
    "mmsae.training": (),
    "mmsae.metrics": (),
    "mmsae.interpret": ("evidence.folder",),
    "mmsae.look": ("photographs", "summary"),
    "mmsae.filtering": ("selection", "selection_exchange"),
    "mmsae.lvlm": ("decoding.concept", "decoding.directions", "recovered"),
    "mmsae.evaluation": ("suite", "features", "callbacks", "zeroshot.head", "ood.head", "ontology.measures"),
    "mmsae.steering": ("methods", "measure"),
    "mmsae.report": ("notebook",),
    "mmsae.kernels": ("pairs",),
    "mmsae.jobs": (),
    "mmsae.interop": (),
    "mmsae.hub": ("command",),
    "mmsae.world": ("generator.scene", "generator.shards"),
    "datamodules": (),
}


def modules(package):
    """Names of the modules below a package that are documented."""
    for name in PACKAGES[package]:
        module = importlib.import_module(f"{package}.{name}")
        below = [f"{module.__name__}.{m.name}" for m in pkgutil.iter_modules(getattr(module, "__path__", ()))]
        yield from below or [module.__name__]


def page(package):
    """One page of the reference, in reStructuredText."""
    text = f"{package}\n{'=' * len(package)}\n\n.. automodule:: {package}\n   :members:\n"
    text += "   :imported-members:\n" if hasattr(importlib.import_module(package), "__all__") else ""
    for name in modules(package):
        text += f"\n{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
    return text


def write_api(app):
    """Write the pages of the reference beside the others; git ignores them."""
    folder = HERE / "reference" / "api"
    folder.mkdir(exist_ok=True)
    for package in PACKAGES:
        file, text = folder / f"{package}.rst", page(package)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def setup(app):
    """Sphinx calls this."""
    app.connect("builder-inited", write_api)
    GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end  # "a: b" of a field has no type

"""What mkdocs does beside its plugins: equations as MathML, pictures of the benchmarks, every public name described."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURES = "examples/benchmarks/results/"  # where they are committed, beside the figures that they show
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
PUBLIC = ("pion_hf", "pion_hf.integrations.trl")  # modules whose `__all__` options.md describes


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The benchmarks' pictures are part of the site, and there is no public name that the pages do not describe."""
    for picture in sorted(ROOT.glob(f"{PICTURES}*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    missing = undescribed(files.src_uris["options.md"].content_string)
    if missing:
        raise PluginError(f"public names without a docstring or an entry in docs/options.md: {', '.join(missing)}")
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to these pictures, which are right in the repository, become right in the site."""
    return markdown.replace(f"../{PICTURES}", "pictures/")


def on_page_content(html: str, **_: Any) -> str:
    """Equations that a browser shows without JavaScript."""
    return EQUATION.sub(
        lambda found: convert(unescape(found[2]), display="inline" if found[1] == "span" else "block"), html
    )


def undescribed(page: str) -> list[str]:
    """Public names without a docstring, or without an entry on `page`."""
    entries = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    package, missing = griffe.load("pion_hf", search_paths=[str(ROOT)]), []
    for module in PUBLIC:
        for name in package[module.removeprefix("pion_hf").lstrip(".")].exports if "." in module else package.exports:
            path = f"{module}.{name}"
            if not name.startswith("__") and not (path in entries and package[path.partition(".")[2]].has_docstring):
                missing.append(path)
    return missing

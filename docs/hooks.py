"""What the site shows of the repository outside docs/: figures, sources, notebooks.

Pages link to such files as they lie in the repository, `../benchmarks/results/x.png`, so that the links hold where
the pages are read there. Here each file that a page links to is given a place in the site: figures as they are,
sources and notebooks as pages, and the links are turned there. A link to a file that is not there breaks the build.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")
FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md", "notebooks/quickstart.ipynb", "notebooks/stability_ratio_curves.ipynb")
"""In the navigation, whoever links to them."""
IMAGES = (".png", ".svg")

published: dict[str, str] = {}
"""From paths in the repository to paths in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    published.clear()
    waiting = list(ALWAYS)
    for file in files.documentation_pages():
        waiting += _outside_docs(file.content_string, f"docs/{file.src_uri}")
    while waiting:
        path = waiting.pop()
        if path in published:
            continue
        source = ROOT / path
        if not source.is_file():
            log.warning(f"a page links to {path}, which is not in the repository")
        elif source.suffix in IMAGES:
            published[path] = path
            files.append(File.generated(config, path, abs_src_path=str(source)))
        else:
            published[path] = str(Path(path).with_suffix(".md")) if source.suffix else f"{path}.md"
            content = _page(source)
            files.append(File.generated(config, published[path], content=content))
            waiting += _outside_docs(content, path) if source.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    origin = next((path for path, place in published.items() if place == here), f"docs/{here}")
    if Path(origin).suffix != ".md":
        return markdown

    def turned(match: re.Match[str]) -> str:
        path = _resolved(match[1], origin)
        place = path.removeprefix("docs/") if path.startswith("docs/") else published.get(path)
        return match[1] if place is None else posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(turned, markdown)


def _resolved(target: str, origin: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _outside_docs(markdown: str, origin: str) -> list[str]:
    """Paths in the repository, outside docs/, that a page links to."""
    paths = [_resolved(target, origin) for target in LINK.findall(FENCED.sub("", markdown))]
    return [path for path in paths if not path.startswith("docs/")]


def _page(source: Path) -> str:
    if source.suffix == ".ipynb":
        return _notebook(json.loads(source.read_text()))
    if source.suffix == ".md":
        return source.read_text()
    language = source.suffix.lstrip(".") or "text"
    return f"# {source.relative_to(ROOT)}\n\n{_fence(source.read_text(), language)}"


def _fence(text: str, language: str) -> str:
    return f"~~~~{language}\n{text.rstrip()}\n~~~~\n"


def _notebook(notebook: dict[str, Any]) -> str:
    """Its cells with their outputs, as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fence(source, "python"))
        parts += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![figure](data:image/png;base64,{''.join(data['image/png']).strip()})".replace("\n", "")
    text = output.get("text") or data.get("text/plain", "")
    return _fence("".join(text), "text") if text else ""

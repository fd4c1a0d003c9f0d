"""mkdocs hook: adds files outside of docs/ to the site, under their paths in the repository.

Pages of docs/ link to figures, tables and CONTRIBUTING.md by relative paths, as GitHub needs them
(`../results/bench/gpu_steps.png`). The site has the same files at `results/bench/gpu_steps.png`, so links are rewritten
here. A link to a file that is not in the site stays broken, and `mkdocs build --strict` reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).parents[1]
PATTERNS = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "results/*.yaml",
    "results/*.csv",
    "results/bench/**/*",
    "results/study/README.md",
    "results/tables/*",
)
# The target of a Markdown link or image: ](target) or ](target#anchor).
_LINK = re.compile(r"(?<=\]\()(?![a-z][a-z0-9+.-]*:|#|/)([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(path for pattern in PATTERNS for path in PROJECT.glob(pattern) if path.is_file()):
        files.append(File.generated(config, path.relative_to(PROJECT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    docs = Path(config.docs_dir).relative_to(PROJECT).as_posix()
    uri = page.file.src_uri
    in_docs = Path(config.docs_dir, uri).is_file()
    source = posixpath.dirname(posixpath.join(docs, uri) if in_docs else uri)
    here = posixpath.dirname(uri) or "."

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(source, match[1]))
        return posixpath.relpath(target.removeprefix(f"{docs}/"), here)

    return _LINK.sub(rewritten, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    return _without_cdn(output, posixpath.relpath(".", posixpath.dirname(page.url) or "."))


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    return _without_cdn(output, ".")


def _without_cdn(html: str, root: str) -> str:
    """Replace the script that the offline plugin loads from a CDN by docs/assets/file-worker.js."""
    return html.replace("https://unpkg.com/iframe-worker/shim", f"{root}/assets/file-worker.js")

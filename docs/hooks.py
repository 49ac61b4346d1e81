"""What the site needs beyond mkdocs: files from outside `docs/`, mathematics without a script, no outside request.

mkdocs calls the three functions below while it builds (`hooks:` in mkdocs.yml).
"""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"  # `make test` and `make docs` leave the notebooks with their outputs in its `tutorials/`
PICTURES = {".svg", ".png", ".jpg", ".webp"}

log = logging.getLogger("mkdocs.hooks.pkexplain")

# Where pymdownx.arithmatex (`generic: true`) leaves the LaTeX of a Markdown page.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
# A notebook's cells keep their dollars; code, scripts and styles are not mathematics.
VERBATIM = re.compile(r"(<(pre|code|script|style|textarea)\b.*?</\2>)", re.DOTALL)
DOLLARS = re.compile(r"(?<![\\$])(?:\$\$([^$<>]+)\$\$|\$(?=\S)([^$<>]+?)(?<=\S)\$(?!\d))")
# nbconvert loads MathJax and Mermaid from outside; neither is needed.
OUTSIDE_SCRIPT = re.compile(r"<script\b(?:(?!</script>).)*?https?://(?:(?!</script>).)*?</script>", re.DOTALL)

STRETCHY_BAR = re.compile(r"<m[oi][^>]*>(&#x02016;|&#x0007C;|\|)</m[oi]>")

# What a browser fetches when it opens a page or a style sheet. A plain link is not a request.
REQUEST = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*rel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*?href=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|@import\s*(?:url\()?\s*["']?(?:https?:)?//[^"'\s)]+"""
    r"""|url\(\s*["']?(?:https?:)?//[^"'\s)]+""",
    re.IGNORECASE,
)


@event_priority(100)  # before mkdocs-jupyter, which turns notebooks into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, the pictures and the tutorials, which are outside `docs/`."""
    outside = [(ROOT, "CHANGELOG.md")]
    for picture in sorted((ROOT / "assets").iterdir()):
        if picture.suffix in PICTURES:
            outside.append((ROOT, f"assets/{picture.name}"))
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        executed = BUILD / "tutorials" / notebook.name
        fresh = executed.exists() and executed.stat().st_mtime >= notebook.stat().st_mtime
        outside.append((BUILD if fresh else ROOT, f"tutorials/{notebook.name}"))
    for folder, path in outside:
        files.append(File(path, str(folder), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn LaTeX into MathML, which browsers lay out by themselves."""
    where = page.file.src_uri
    content = BLOCK.sub(lambda m: _mathml(m[1], "block", where), content)
    content = INLINE.sub(lambda m: _mathml(m[1], "inline", where), content)
    if where.endswith(".ipynb"):
        content = OUTSIDE_SCRIPT.sub("", content)
        parts = VERBATIM.split(content)
        # split() with two groups yields: text, verbatim, its tag, text, …
        parts[::3] = [DOLLARS.sub(lambda m: _dollars(m, where), text) for text in parts[::3]]
        content = "".join(part for i, part in enumerate(parts) if i % 3 != 2)
    return content


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would fetch anything from outside."""
    site = Path(config.site_dir)
    for path in sorted(site.rglob("*")):
        if path.suffix in {".html", ".css"}:
            found = REQUEST.search(path.read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{path.relative_to(site)} makes an outside request: {found[0][:200]}")


def _dollars(found: re.Match[str], where: str) -> str:
    block, inline = found.groups()
    return _mathml(block, "block", where) if block else _mathml(inline, "inline", where)


def _mathml(latex: str, display: str, where: str) -> str:
    latex = html.unescape(latex).strip()
    # Bars of a norm or a modulus keep the height of a letter: they come without a fence to say what they enclose.
    result = STRETCHY_BAR.sub(r'<mo stretchy="false">\1</mo>', convert(latex, display=display))
    # The converter passes on what it does not know, as a word; under --strict a warning stops the build.
    unknown = re.search(r"\\[A-Za-z]+|>&<", html.unescape(result))
    if unknown:
        log.warning("%s: LaTeX that the converter does not know, %r in %s", where, unknown[0], latex)
    return f'<div class="math">{result}</div>' if display == "block" else result

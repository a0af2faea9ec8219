"""Hooks of mkdocs: what the pages link to outside of docs/ is part of the site too.

A link in README, CONTRIBUTING or a page of docs/ is a path in the repository, so that it works there. The site has the README
as its first page, and under `repository/` each other file that a page links to: Markdown as a page, code as a listing. Here
links become those of the site. mkdocs refuses, in strict mode, a link that leads nowhere.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
ALWAYS = ("README.md", "CONTRIBUTING.md")  # pages of the site although no page may link to them
FENCE = re.compile(r"^(```.*?^```)$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def page_of(path: str) -> str:
    """Return the page, in docs/ or made here, that shows a file of the repository; both are paths, relative to their root."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" + ("" if path.endswith(".md") else ".md")


def file_of(page: str) -> str:
    """Return the file of the repository that a page shows: `page_of`, the other way round."""
    if page == "index.md":
        return "README.md"
    if not page.startswith("repository/"):
        return f"docs/{page}"
    path = page.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def links(text: str) -> Iterator[str]:
    """Yield the paths that a page links to, as they stand there; those in code are no links."""
    for part in FENCE.split(text):
        if not part.startswith("```"):
            yield from (found[2] for found in LINK.finditer(part) if "://" not in found[2])


def linked_from(path: str, link: str) -> str:
    """Return the file of the repository that a link in the file `path` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def outside() -> list[str]:
    """Return the files outside of docs/ that the site shows: those of `ALWAYS`, and what they and the pages link to."""
    found, unread = set(ALWAYS), [*ALWAYS, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    while unread:
        path = unread.pop()
        if path.endswith(".md"):
            for link in links((ROOT / path).read_text(encoding="utf-8")):
                target = linked_from(path, link)
                if not target.startswith("docs/") and target not in found and (ROOT / target).is_file():
                    found.add(target)
                    unread.append(target)
    return sorted(found)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `outside` to the site. mkdocs calls this once it has found docs/."""
    for path in outside():
        text = (ROOT / path).read_text(encoding="utf-8")
        if not path.endswith(".md"):
            text = f"# `{path}`\n\n````{path.rpartition('.')[2]}\n{text}\n````\n"
        files.append(File.generated(config, page_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its links as the site has them. mkdocs calls this for each page before it reads its Markdown."""
    here = page.file.src_uri
    path = file_of(here)
    if not path.endswith(".md"):  # a listing of code
        return markdown

    def in_site(found: re.Match) -> str:
        if "://" in found[2]:
            return found[0]
        target = page_of(linked_from(path, found[2]))
        return found[1] + posixpath.relpath(target, posixpath.dirname(here) or ".") + found[3]

    return "".join(part if part.startswith("```") else LINK.sub(in_site, part) for part in FENCE.split(markdown))

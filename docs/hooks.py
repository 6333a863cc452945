"""Add the repository's own pages to the site: README as the home page, CHANGELOG, CONTRIBUTING, and eval/results.

Links are written for the repository, so that every page also works there. In the site, each link is changed to
the page that the file became; a link to a file without a page becomes plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def in_site(path: str) -> str:
    """Return the path in the site for a file of the repository."""
    return PAGES.get(path, path.removeprefix("docs/"))


def in_repository(page: str) -> str:
    """Return the path in the repository for a path in the site: the inverse of `in_site`."""
    if page.startswith("eval/"):
        return page
    return next((path for path, name in PAGES.items() if name == page), f"docs/{page}")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/."""
    results = [path for path in sorted((ROOT / "eval/results").iterdir()) if path.suffix in (".md", ".png")]
    for path in [*(ROOT / name for name in PAGES), *results]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, in_site(name), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **kwargs: Any) -> str:
    """Change links to repository files into links to pages of the site; leave code blocks unchanged."""
    here = page.file.src_uri
    folder = posixpath.dirname(in_repository(here))

    def turn(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return link[0]
        path, hash_sign, anchor = target.partition("#")
        found = in_site(posixpath.normpath(posixpath.join(folder, path)))
        if files.get_file_from_path(found) is None:
            if not (ROOT / folder / path).exists():
                raise ValueError(f"{in_repository(here)} links to {target}, which does not exist")
            return text
        return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(here) or '.')}{hash_sign}{anchor})"

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(turn, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(turn, markdown[end:])])

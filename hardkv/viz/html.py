"""A piece of HTML that notebooks show and files keep."""

from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path

from hardkv.files import write_text


@dataclass(frozen=True, repr=False)
class Html:
    """HTML that a notebook shows as a cell's last value.

    Args:
        body: what stands in a page's body; nothing in it is escaped any more.
        title: of a page that `save` writes.
    """

    body: str
    title: str

    def _repr_html_(self) -> str:
        return self.body

    def __repr__(self) -> str:
        return f"Html({self.title!r}, {len(self.body):,} characters: show it in a notebook, or save(path) it)"

    def save(self, path: "str | PathLike[str]") -> Path:
        """Write a page that stands alone; returns its path.

        Raises:
            OSError: it cannot be written, or something other than a file stands there.
        """
        page = f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(self.title)}</title>\n'
        write_text(path, f"{page}<body>\n{self.body}\n</body>\n</html>\n")
        return Path(path)

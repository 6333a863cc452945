"""Html: a piece of HTML for notebooks and files."""

from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path

from hardkv.files import write_text


@dataclass(frozen=True, repr=False)
class Html:
    """HTML that a notebook shows as the last value of a cell.

    Args:
        body: content of the page's body; it is not escaped again.
        title: title of the page that `save` writes.
    """

    body: str
    title: str

    def _repr_html_(self) -> str:
        return self.body

    def __repr__(self) -> str:
        return f"Html({self.title!r}, {len(self.body):,} characters: show it in a notebook, or save(path) it)"

    def save(self, path: "str | PathLike[str]") -> Path:
        """Write a complete page and return its path.

        Raises:
            OSError: the file cannot be written, or the path is something other than a file.
        """
        page = f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(self.title)}</title>\n'
        write_text(path, f"{page}<body>\n{self.body}\n</body>\n</html>\n")
        return Path(path)

"""Files that users name: checked before any work, and written completely or not at all."""

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


def check_writable(path: "str | os.PathLike[str]") -> Path:
    """Return the file that `replacing(path)` would write, with symlinks resolved. Make and change nothing.

    Call it before the work whose result is to be written.

    Raises:
        OSError: `path` is not a regular file (a folder, FIFO, socket or device), or the file or its folder may not be
            written.
    """
    name = os.fspath(path)
    if name.endswith(("/", os.sep)):
        raise IsADirectoryError(f"{name!r} is a folder: name a file")
    target = Path(os.path.realpath(name))
    for place in (name, target):  # check both: the target of /dev/stdout has no name
        try:
            mode = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{name!r} is a folder: name a file")
        if not stat.S_ISREG(mode):
            raise OSError(f"{name!r} is {_special(mode)}, which would be replaced by a file: name a file")
        if not os.access(place, os.W_OK):
            raise PermissionError(f"{name!r} is there and may not be written: name another file, or change its mode")
    folder = next(each for each in target.parents if each.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{name!r} cannot be written, since {str(folder)!r} is no folder: name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{name!r} cannot be written, since nothing may be written into {str(folder)!r}: name a file elsewhere"
        )
    return target


def file_to_write(text: str) -> Path:
    """Return the path of a file that `replacing` can write, for argparse's `type=`."""
    try:
        check_writable(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def _special(mode: int) -> str:
    """Return the name for a FIFO, socket or device, by its `st_mode`."""
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


@contextmanager
def replacing(path: "str | os.PathLike[str]") -> Iterator[BinaryIO]:
    """Open a new file. It replaces the file at `path` when the block ends, and is removed if the block raises.

    The folder is made if needed, symlinks are followed, and an old file's mode and owner are kept. If several processes
    write at once, the last one's file stays.

    Args:
        path: of the file.

    Raises:
        OSError: the file cannot be written; see `check_writable`.
    """
    target = check_writable(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".hardkv-{uuid4().hex}")  # in the same folder, because only there a rename is atomic
    try:
        with open(new, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            _keep(os.stat(target), new)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def _keep(old: os.stat_result, new: Path) -> None:
    """Give a new file the mode of an old one, and its owner as far as this user may."""
    if hasattr(os, "chown"):  # not on Windows
        for owner in (old.st_uid, -1):
            with suppress(PermissionError):
                os.chown(new, owner, old.st_gid)
                break
    os.chmod(new, stat.S_IMODE(old.st_mode))  # last, because a change of owner may clear bits of the mode


def write_text(path: "str | os.PathLike[str]", text: str) -> None:
    """Write a UTF-8 file as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))

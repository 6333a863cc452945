"""Errors that the user can fix, and the check for optional packages."""

from importlib.util import find_spec


class InputError(Exception):
    """A request cannot be fulfilled; the message says why."""


class MissingPackageError(ImportError):
    """A package that only some commands need is not installed."""


def require(extra: str, *packages: str) -> None:
    """Check that optional packages can be imported, without importing them.

    Args:
        extra: the extra of hardkv that installs them.
        packages: top-level import names.

    Raises:
        MissingPackageError: some of them are not installed.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"not installed: {', '.join(missing)}. Run: pip install 'hardkv[{extra}]'")

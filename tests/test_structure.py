"""Test the structure of the package: the direction of imports, and the size of files."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hardkv"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350  # lines


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path, lazily=True):
    """Return the modules that a file imports, as absolute names; `lazily`: include imports within functions."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {id(node) for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
    for node in ast.walk(tree):
        if not lazily and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def circles(graph):
    """Return groups of modules that import each other (Tarjan's strongly connected components of two or more)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_imports_make_no_circle():
    """Imports for type checkers and lazy imports count too; only a package's own modules may name the package."""
    # the constructor imports the calibration, which builds on the cache
    lazy = {("hardkv.cache.build", "hardkv.calibration.auto")}
    graph = {
        name: {other for other in imported(path) if other in MODULES and other != name and (name, other) not in lazy}
        for name, path in MODULES.items()
    }
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("hardkv.kernels", ["hardkv.kernels"]),
        ("hardkv.selectors", ["hardkv.kernels", "hardkv.selectors"]),
        ("hardkv.cache.storage", ["hardkv.kernels", "hardkv.cache.storage"]),
        (
            "hardkv.cache.events",
            ["hardkv.kernels", "hardkv.selectors", "hardkv.config", "hardkv.cache.storage", "hardkv.cache.events"],
        ),
    ],
)
def test_rooms_that_serve_any_engine(room, allowed):
    """These modules must not import transformers, and may import only the hardkv modules below them."""
    inside = {name: path for name, path in MODULES.items() if f"{name}.".startswith(f"{room}.")}
    assert inside
    for name, path in inside.items():
        for other in imported(path):
            assert other.partition(".")[0] != "transformers", f"{name} imports {other}"
            if other.partition(".")[0] == "hardkv":
                assert any(f"{other}.".startswith(f"{each}.") for each in allowed), f"{name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_short(path):
    """A longer file explains its length in its first lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST or "one file because" in " ".join(lines[:12]), f"{len(lines)} lines"

"""Find changes that the tests do not notice: make one small change at a time in a copy, and run the tests.

    python -m tests.mutants hardkv/cache/storage/tiers.py --tests "tests/cache/test_invariants.py"

Every mutant runs in a fork of a process that has already imported everything but hardkv and its tests, so that it
costs only its tests. Run it by hand, not in CI: a survivor means a missing test, or a change without effect.
"""

import argparse
import ast
import copy
import importlib
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Change = Callable[[Any], None]

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"min": "max", "amin": "amax", "clamp_min": "clamp_max", "all": "any", "minimum": "maximum"}
NAMES |= {new: old for old, new in NAMES.items()}


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """Return the possible changes of a node in place, with descriptions."""
    match node:
        case ast.Compare(ops=[operator]):
            new = COMPARISONS[type(operator)]
            yield f"{type(operator).__name__} -> {new.__name__}", lambda n: setattr(n, "ops", [new()])
        case ast.BoolOp():
            other = ast.Or if isinstance(node.op, ast.And) else ast.And
            yield f"-> {other.__name__}", lambda n: setattr(n, "op", other())
        case ast.UnaryOp(op=ast.Not()):
            yield "not removed", lambda n: setattr(n, "operand", ast.UnaryOp(ast.Not(), n.operand))
        case ast.Constant(value=bool()):
            yield f"-> {not node.value}", lambda n: setattr(n, "value", not n.value)
        case ast.Constant(value=int()):
            yield f"{node.value} -> {node.value + 1}", lambda n: setattr(n, "value", n.value + 1)
        case ast.BinOp() | ast.AugAssign() if type(node.op) in OPERATORS:
            replaced = OPERATORS[type(node.op)]
            yield f"{type(node.op).__name__} -> {replaced.__name__}", lambda n: setattr(n, "op", replaced())
        case ast.IfExp():
            yield "always the first", lambda n: setattr(n, "test", ast.Constant(True))
            yield "always the second", lambda n: setattr(n, "test", ast.Constant(False))
        case ast.If():
            yield "never", lambda n: setattr(n, "test", ast.Constant(False))
        case ast.Return(value=ast.expr()) if ast.unparse(node.value) != "None":
            yield "returns None", lambda n: setattr(n, "value", ast.Constant(None))
        case ast.Call():
            yield from changes_of_call(node)
    for name in ("body", "orelse"):
        statements = getattr(node, name, None)
        for i, statement in enumerate(statements if isinstance(statements, list) else []):
            if removable(statement):
                yield f"removed: {ast.unparse(statement)[:60]}", put(name, i, ast.Pass())


def changes_of_call(node: ast.Call) -> Iterator[tuple[str, Change]]:
    """Return the changes of a call: the other function of a pair, and each keyword argument left out."""
    match node.func:
        case ast.Name(id=name) if name in NAMES:
            yield f"{name} -> {NAMES[name]}", lambda n: setattr(n.func, "id", NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield f"{name} -> {NAMES[name]}", lambda n: setattr(n.func, "attr", NAMES[name])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield f"without {keyword.arg}=", lambda n, i=i: n.keywords.pop(i)


def removable(statement: ast.AST) -> bool:
    """Return whether a statement can be removed: it defines no later names and is no docstring."""
    if isinstance(statement, ast.Assign):
        return not all(isinstance(target, ast.Name) for target in statement.targets)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return isinstance(statement, ast.AugAssign | ast.Raise)


def put(name: str, i: int, statement: ast.stmt) -> Change:
    """Return a change that replaces one statement by another."""
    return lambda n: getattr(n, name).__setitem__(i, statement)


def mutants(source: str) -> Iterator[tuple[int, str, Callable[[], str]]]:
    """Return every mutant of a file: line, description, and its source. Messages and annotations do not change."""
    tree = ast.parse(source)
    left_alone: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns", "decorator_list")]
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            parts.append(node)
        if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__"):
            parts.append(node)
        for part in parts:
            for root in part if isinstance(part, list) else [part]:
                left_alone |= set(ast.walk(root)) if isinstance(root, ast.AST) else set()

    def made(place: int, change: Change) -> str:
        mutant = copy.deepcopy(tree)
        change(next(each for i, each in enumerate(ast.walk(mutant)) if i == place))
        return ast.unparse(ast.fix_missing_locations(mutant))

    for place, node in enumerate(ast.walk(tree)):
        for what, change in changes(node) if node not in left_alone else ():
            where = f"{ast.unparse(node).splitlines()[0][:90]}: {what}"
            yield getattr(node, "lineno", 0), where, partial(made, place, change)


def of_the_copy(module: str) -> bool:
    """Return whether every fork must import a module itself."""
    return module.split(".")[0] in ("tests", "hardkv", "conftest", "__main__")


def run_tests(folder: Path, arguments: list[str], seconds: int, show: bool = False) -> tuple[str, float]:
    """Run pytest in a fork on a folder; return ("passed", "failed" or "too long", seconds of processor time).

    Args:
        seconds: limit on processor time, since other work may slow everything; the wall-clock limit is ten times that.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", os.getcwd()))]
        for name in [name for name in sys.modules if of_the_copy(name) and name != "__main__"]:
            del sys.modules[name]
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        if not show:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        code = 1
        try:
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
            (folder / "imported").write_text("\n".join(name for name in sys.modules if not of_the_copy(name)))
        finally:
            os._exit(code)
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - start > 10 * seconds:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    spent = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        return "too long", spent
    return ("passed" if os.WEXITSTATUS(status) == 0 else "failed"), spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="whose mutants are made")
    parser.add_argument("--tests", required=True, help="pytest's arguments: the fast tests of these files")
    parser.add_argument("--number", type=int, default=20, help="mutants of each file, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--minutes", type=float, default=60, help="no further mutant begins after so long")
    parser.add_argument("--only", default="", help="only mutants whose line, `FILE:LINE: ...`, contains this")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    end, tests = time.monotonic() + 60 * args.minutes, shlex.split(args.tests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("hardkv", "tests"):
            shutil.copytree(part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy("pyproject.toml", folder)
        result, spent = run_tests(folder, tests, 3600)
        if result != "passed":
            run_tests(folder, tests, 3600, show=True)
            raise SystemExit("the tests fail without any mutant")
        for module in (folder / "imported").read_text().split():  # import once for all forks
            with suppress(Exception):
                importlib.import_module(module)
        assert "hardkv" not in sys.modules  # every fork imports its own
        result, spent = run_tests(folder, tests, 3600)
        print(f"{result} in {spent:.0f} s of processor time without a mutant", flush=True)
        counts = {"failed": 0, "too long": 0, "passed": 0}
        for file in args.files:
            source = file.read_text()
            found = [each for each in mutants(source) if args.only in f"{file}:{each[0]}: {each[1]}"]
            drawn = random.Random(args.seed).sample(found, min(args.number, len(found)))
            for line, what, make in sorted(drawn, key=lambda each: each[:2]):
                if time.monotonic() > end:
                    break
                (folder / file).write_text(make())
                result, _ = run_tests(folder, tests, int(3 * spent) + 10)
                counts[result] += 1
                if result != "failed":
                    print(f"{'survived' if result == 'passed' else result}  {file}:{line}: {what}", flush=True)
            (folder / file).write_text(source)
            print(f"{file}: {len(found)} mutants, {counts} so far", flush=True)


if __name__ == "__main__":
    main()

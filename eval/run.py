r"""Measure accuracy, length, memory and speed of answers with full and compressed caches.

    python -m eval.run --model Qwen/Qwen3-8B --task aime24 --method full,topk,risk --budget 1024,2048,4096 --samples 8
    accelerate launch -m eval.run ...                      # a copy of the model on every GPU, each problem once
    python -m eval.run ... --device-map auto               # one model over several GPUs

Every finished sample is a line in OUT/CONFIGURATION.jsonl. The same command continues where it stopped, and adds the
samples for more methods or budgets, or a higher --limit. It ends with the report, as does `python -m eval.report`.
"""

import argparse
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers

from eval.grading import check_golds
from eval.harness import Harness, cache_options, problem_options, too_weak
from eval.machine import one_line
from eval.methods import METHODS, Configuration, grid
from eval.problem import Problem
from eval.report import report
from eval.sampling import sampling_parameters
from eval.store import SETTINGS, Store
from eval.tasks import TASKS, load_problems
from hardkv import HardKVConfig
from hardkv.extras import MissingPackageError, require
from hardkv.files import check_writable
from hardkv.loading import DEFAULT_MODEL, load
from hardkv.selectors import SCORERS

REASONER = Path(__file__).parent / "reasoner" / "model"
# Data for a calibration: other problems with their dense answers, or the texts that come with hardkv.
CALIBRATE_ON = ("problems", "texts")


def self_check(problems: list[Problem], say: Callable[[str], None]) -> None:
    """Grade every gold answer against itself.

    Raises:
        ValueError: some are graded wrong; the message names them.
    """
    check = check_golds((problem.id, problem.answer) for problem in problems)
    if check.failed:
        raise ValueError(f"these gold answers do not grade themselves correct: {check.failed}")
    if check.exact_only:
        say(
            f"{len(check.exact_only)} of {len(problems)} gold answers are beyond math-verify and count only when they "
            f"are written exactly so: {', '.join(check.exact_only)}"
        )
    say(f"All {len(problems)} gold answers grade themselves correct")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        require("eval", *packages(args))
    except MissingPackageError as error:
        raise SystemExit(f"eval.run: {error}") from error
    from accelerate import PartialState  # from the extra

    # a process may wait hours for another's last answers, longer than the default of torch.distributed
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    transformers.logging.set_verbosity_error()
    try:
        harness, configurations = prepare(args, state)
    except (MissingPackageError, OSError, ValueError) as error:
        raise SystemExit(f"eval.run: {error}") from error
    if harness is None:
        return
    for configuration in configurations:
        if configuration.method != "full" and (dense := too_weak(harness)) is not None:
            harness.say(f"The full cache solves {dense:.0%}, below {args.least_dense:.0%}: nothing else is run")
            break
        try:
            settings = harness.settings(configuration)
        except (OSError, ValueError) as error:
            raise SystemExit(f"eval.run: {configuration.label}: {error}") from error
        harness.run(configuration, settings)
    if harness.is_main:
        print(report(args.out))


def packages(args: argparse.Namespace) -> list[str]:
    """Return the optional packages that a command will import."""
    needed = ["accelerate", "matplotlib"]
    if TASKS[args.task].source is not None:
        needed += ["math_verify"]
        needed += ["datasets"] if args.data is None else ["pyarrow"] if args.data.suffix == ".parquet" else []
    return needed


def prepare(args: argparse.Namespace, state: Any) -> "tuple[Harness | None, list[Configuration]]":
    """Check everything that can be wrong before hours of work; return None instead of a harness for --self-check."""
    task = TASKS[args.task]

    def say(text: str) -> None:
        if state.is_main_process:
            print(text)

    configurations = grid(args.method, args.scorer, args.budget, args.mass, args.bits, cache_options(args))
    model = tokenizer = None
    if not args.self_check:
        check_writable(args.out / SETTINGS)
        model, tokenizer = load(args.model, args.device_map)
    problems = load_problems(args.task, **problem_options(args, tokenizer, args.seed, args.limit))
    if task.source is not None:
        self_check(problems, say)
    if args.self_check:
        return None, []
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is not None and args.max_new_tokens > room:
        say(f"This model was made for at most {room:,} tokens, and --max-new-tokens is {args.max_new_tokens:,}")
    parameters = sampling_parameters(model, args.greedy or not task.sampled)
    if args.samples > 1 and not parameters["do_sample"]:
        raise ValueError(f"--samples {args.samples}: decoding is greedy here, so all would be the same")
    store = Store(args.out, state.process_index)
    with_full = any(configuration.method == "full" for configuration in configurations)
    if not with_full and not (args.out / "full.jsonl").exists():
        needs = [c.label for c in configurations if c.is_fraction]
        needs += ["--stop-when-separated"] if args.stop_when_separated else []
        if needs:
            raise ValueError(f"{', '.join(needs)} need the full cache's results: add full to --method")
    if state.is_main_process:
        store.open(run_settings(args, parameters))
    state.wait_for_everyone()
    return Harness(args, state, store, model, tokenizer, task, problems, parameters), configurations


def run_settings(args: argparse.Namespace, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all results in one folder share, as JSON."""
    names = ["model", "task", "seed", "max_new_tokens", "window", "sinks", "interval", "least_dense"]
    names += {"needle": ["length", "needles", "asked"], "reasoner": ["difficulty"]}.get(args.task, ["data"])
    settings = {name: getattr(args, name) for name in names}
    # for a local model store only the folder's name, because results are read elsewhere
    name = args.model or DEFAULT_MODEL
    settings["model"] = Path(name).absolute().name if Path(name).exists() else name
    if Path(name).absolute() == REASONER:
        settings["model"] = "eval/reasoner/model"
    if settings.get("data") is not None:
        settings["data"] = args.data.name
    source = f"on {args.calibrate_on}" if args.calibration is None else f"by {args.calibration.name}"
    if args.calibration is None and args.calibration_length is not None:
        source += f", {args.calibration_length} tokens of each"
    return settings | {"calibration": source, "sampling": parameters, "machines": [one_line()], "budgets": {}}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and check it as far as possible without a model."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    defaults = HardKVConfig.__dataclass_fields__
    add(
        "--model",
        metavar="NAME",
        help="folder, .gguf file or hub id (default: SmolLM2; reasoner: its own)",
    )
    add("--task", required=True, choices=TASKS, help="what to solve")
    add("--data", type=Path, metavar="FILE", help="JSON, JSONL or parquet with the problems, instead of the hub's")
    add("--method", type=_list, default=["full", "topk"], metavar="A,B", help=f"of {', '.join(METHODS)} (full,topk)")
    add(
        "--scorer",
        type=_list,
        default=[defaults["scorer"].default],
        metavar="A,B",
        help=f"of {', '.join(sorted(SCORERS))} ({defaults['scorer'].default})",
    )
    add(
        "--budget",
        type=_list,
        default=["1024"],
        metavar="N,1/8",
        help="tokens a head, or a fraction of the full cache's length (1024)",
    )
    add("--mass", type=_masses, default=[0.95], metavar="P,P", help="attention mass of topp (default: 0.95)")
    add(
        "--bits",
        type=_list,
        default=["16"],
        metavar="N,4:2",
        help="of the tokens kept, keys:values, or auto (risk only) (16)",
    )
    add("--samples", type=_positive, default=1, metavar="K", help="answers to every problem (default: 1)")
    add("--limit", type=_positive, metavar="N", help="so many problems only (default: all; 100 generated ones)")
    add("--stop-when-separated", action="store_true", help="add no problems once a method differs clearly from full")
    add("--batch-size", type=_positive, default=8, metavar="N", help="answers at once a process (default: 8)")
    add("--max-new-tokens", type=_positive, metavar="N", help="longest answer (default: the task's)")
    add("--greedy", action="store_true", help="not sampled, whatever the model's generation config says")
    add("--seed", type=int, default=0, help="of samples, of generated problems and of data sets' order (default: 0)")
    add("--length", type=_positive, default=1024, metavar="N", help="needle: tokens of the text (default: 1024)")
    add("--needles", type=_positive, default=1, metavar="N", help="needle: numbers hidden (default: 1)")
    add("--asked", type=_positive, metavar="N", help="needle: numbers asked for (default: all)")
    add("--difficulty", type=_positive, metavar="N", help="reasoner: of the problems (default: the generator's)")
    add("--least-dense", type=float, metavar="SHARE", help="accuracy of full below which others are not run")
    for name in ("window", "sinks", "interval"):
        add(
            f"--{name}",
            type=int,
            default=defaults[name].default,
            metavar="N",
            help="of HardKVCache (default: %(default)s)",
        )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="of hardkv calibrate, may hold {scorer} (default: made once, kept in OUT)",
    )
    add(
        "--calibrate-on",
        choices=CALIBRATE_ON,
        help="hardkv's texts, or other problems that are generated (default: texts; reasoner: problems)",
    )
    add("--calibration-length", type=_positive, metavar="N", help="tokens of each text it is made from")
    add("--device-map", metavar="MAP", help="'auto' spreads the model over this machine's GPUs")
    add("--out", type=Path, metavar="DIR", help="results (default: eval-runs/TASK)")
    add("--self-check", action="store_true", help="grade the gold answers by themselves, and stop")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    args.max_new_tokens = args.max_new_tokens or task.max_new_tokens
    args.least_dense = task.least_dense if args.least_dense is None else args.least_dense
    args.out = args.out or Path("eval-runs") / args.task
    unknown = sorted(set(args.scorer) - set(SCORERS))
    if unknown:
        parser.error(f"--scorer {','.join(unknown)}: allowed are {', '.join(sorted(SCORERS))}")
    if args.task == "reasoner":
        args.model = args.model or str(REASONER)
    if args.calibrate_on == "problems" and task.source is not None:
        parser.error(f"--calibrate-on problems: {args.task} has no other ones; use texts, or --calibration FILE")
    # the reasoner's vocabulary cannot encode other texts
    args.calibrate_on = args.calibrate_on or ("problems" if args.task == "reasoner" else "texts")
    if args.device_map is not None and args.model is None:
        parser.error("--device-map needs --model")
    if args.data is not None and task.source is None:
        parser.error(f"--data: the problems of {args.task} are generated")
    if args.self_check and task.source is None:
        parser.error(f"--self-check: the answers of {args.task} are generated")
    return args


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _masses(text: str) -> list[float]:
    return [float(part) for part in _list(text)]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    main()

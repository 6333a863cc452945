"""Answer the problems of a task with every configuration, and store every finished sample."""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from eval.intervals import FAR, FEWEST, by_problem, separated
from eval.methods import Configuration, new_cache
from eval.problem import Problem
from eval.sampling import Answer, answer_batch, seed_of
from eval.store import Store
from eval.tasks import Task, load_problems
from hardkv import Calibration, HardKVConfig, calibrate

# Number of generated problems whose dense answers a calibration uses.
CALIBRATION_PROBLEMS = 6


@dataclass
class Harness:
    """Hold the state of one run that all configurations share."""

    args: argparse.Namespace
    state: Any  # accelerate's PartialState
    store: Store
    model: Any
    tokenizer: Any
    task: Task
    problems: list[Problem]
    parameters: dict[str, Any]

    @property
    def options(self) -> dict[str, int]:
        """Return the options of every HardKVCache."""
        return cache_options(self.args)

    def run(self, configuration: Configuration, settings: HardKVConfig | None) -> None:
        """Run the missing samples of one configuration, or until it differs clearly from the full cache."""
        label, args = configuration.label, self.args
        prompts = {problem.id: self.encode(problem) for problem in self.problems}
        done = {(record["id"], record["sample"]) for record in self.store.records(label)}
        wanted = [(problem, sample) for problem in self.problems for sample in range(args.samples)]
        missing = [(problem, sample) for problem, sample in wanted if (problem.id, sample) not in done]
        may_stop = args.stop_when_separated and configuration.method != "full"
        size = max(args.batch_size * self.state.num_processes, FEWEST * args.samples) if may_stop else len(wanted)
        bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=label, disable=not self.is_main)
        with bar:
            for start in range(0, len(missing), size):
                if may_stop and self.is_separated(label):
                    break
                # prompts of similar length in one batch need little padding; rounds keep the order of the problems
                part = sorted(missing[start : start + size], key=lambda item: len(prompts[item[0].id]))
                batches = [part[at : at + args.batch_size] for at in range(0, len(part), args.batch_size)]
                for batch in batches[self.state.process_index :: self.state.num_processes]:
                    cache = new_cache(self.model, settings)
                    self.store.append(label, self.answer(batch, prompts, cache))
                    bar.update(len(batch) * self.state.num_processes)
                self.merge(label)

    def answer(self, batch: list[tuple[Problem, int]], prompts: dict[str, list[int]], cache: Any) -> list[dict]:
        """Return the records of one batch."""
        seeds = [seed_of(self.args.seed, problem.id, sample) for problem, sample in batch]
        limit = self.args.max_new_tokens
        with tqdm(total=limit, desc="tokens", leave=False, disable=not self.is_main) as bar:
            answers = answer_batch(
                self.model,
                self.tokenizer,
                [prompts[problem.id] for problem, _ in batch],
                cache,
                seeds=seeds,
                parameters=self.parameters,
                max_new_tokens=limit,
                on_step=lambda steps: bar.update(1),
            )
        return [
            self.record(problem, sample, seed, answer)
            for (problem, sample), seed, answer in zip(batch, seeds, answers, strict=True)
        ]

    def record(self, problem: Problem, sample: int, seed: int, answer: Answer) -> dict[str, Any]:
        """Return one line of a JSONL file."""
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        figures = asdict(answer)
        figures["new_tokens"] = len(figures.pop("tokens"))
        return {
            "id": problem.id,
            "sample": sample,
            "seed": seed,
            "correct": self.task.correct(text, problem.answer, answer.truncated),
            "gold": problem.answer,
            "text": text,
        } | figures

    def settings(self, configuration: Configuration) -> HardKVConfig | None:
        """Return the arguments of the configuration's HardKVCache; None for the full cache."""
        if configuration.method == "full":
            return None
        n = configuration.tokens(self.full_length() if configuration.is_fraction else None)
        if n is not None and configuration.is_fraction:
            if self.is_main:
                self.store.budget(str(configuration.budget), n)
            self.state.wait_for_everyone()
            n = self.store.budget(str(configuration.budget), n)
        assert configuration.scorer is not None
        calibration = self.calibration(configuration.scorer) if configuration.needs_calibration else None
        return configuration.settings(n, self.options, calibration)

    def full_length(self) -> float:
        """Return the mean tokens of prompt and answer with the full cache.

        Raises:
            ValueError: the full cache has not run in this folder.
        """
        records = self.store.records("full")
        if not records:
            raise ValueError("budgets as fractions need the full cache's lengths: add full to --method")
        return float(np.mean([record["prompt_tokens"] + record["new_tokens"] for record in records]))

    def calibration(self, scorer: str) -> Calibration:
        """Return the given calibration, the one stored in this folder, or a new one."""
        if self.args.calibration is not None:
            return Calibration.load(str(self.args.calibration).replace("{scorer}", scorer))
        path = self.store.folder / "calibrations" / f"{scorer}.safetensors"
        if self.is_main and not path.exists():
            calibrate(
                self.model,
                self.own_answers() if self.args.calibrate_on == "problems" else None,
                tokenizer=self.tokenizer,
                scorer=scorer,
                length=self.args.calibration_length,
                **self.options,
            ).save(path)
        self.state.wait_for_everyone()
        return Calibration.load(path)

    def own_answers(self) -> list[torch.Tensor]:
        """Return other problems of a generated task with the model's answers, ids `[n]`."""
        others = load_problems(
            self.args.task, **problem_options(self.args, self.tokenizer, self.args.seed + 1, CALIBRATION_PROBLEMS)
        )
        prompts = [self.encode(problem) for problem in others]
        answers = answer_batch(
            self.model,
            self.tokenizer,
            prompts,
            new_cache(self.model, None),
            seeds=[seed_of(self.args.seed + 1, problem.id, 0) for problem in others],
            parameters=self.parameters,
            max_new_tokens=self.args.max_new_tokens,
        )
        return [torch.tensor(prompt + answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]

    def encode(self, problem: Problem) -> list[int]:
        """Return the token ids of a problem's prompt."""
        text = f"{problem.text}\n\n{self.task.instruction}" if self.task.instruction else problem.text
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"{text}\n").input_ids
        message = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    def is_separated(self, label: str) -> bool:
        """Return whether it clearly differs from the full cache; merged results make all processes decide alike."""
        full = by_problem(self.store.records("full"))
        if not separated(by_problem(self.store.records(label)), full):
            return False
        self.say(f"{label}: {FAR:.1%} interval of the difference to full excludes 0, no more problems are added")
        return True

    def merge(self, label: str) -> None:
        """Merge the results of all processes."""
        self.state.wait_for_everyone()
        if self.is_main:
            self.store.merge(label)
        self.state.wait_for_everyone()

    @property
    def is_main(self) -> bool:
        return bool(self.state.is_main_process)

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)


def cache_options(args: argparse.Namespace) -> dict[str, int]:
    return {"window": args.window, "sinks": args.sinks, "interval": args.interval}


def problem_options(args: argparse.Namespace, tokenizer: Any, seed: int, limit: int | None) -> dict[str, Any]:
    return {
        "data": args.data,
        "seed": seed,
        "limit": limit,
        "tokenizer": tokenizer,
        "length": args.length,
        "facts": args.needles,
        "asked": args.asked,
        "difficulty": args.difficulty,
    }


def too_weak(harness: Harness) -> float | None:
    """Return the full cache's accuracy if it is too low to compare anything; None otherwise, or if it has not run."""
    accuracy = by_problem(harness.store.records("full"))
    mean = float(np.mean(list(accuracy.values()))) if accuracy else 1.0
    return mean if mean < harness.args.least_dense else None

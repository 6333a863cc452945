"""Decoding a full-size model end to end: hardkv and its peers in one run, against the least time that memory allows.

    python -m eval.speed.generate --out eval/results/generate.json    # one CUDA GPU
    python -m eval.speed.generate_report eval/results/generate.json   # tables, and the picture beside the JSON
    python -m eval.speed.generate --profile    # also where the time of each step and prompt goes

Models have their real shapes and random weights. Every method decodes through `model.generate`; a step is the time
between two calls of a stopping criterion. Where only decoding is timed, the context is not computed but filled in with
random keys and values ("synthetic fill"): of hardkv's caches with what a budget keeps of it. `limit_ms` is the time in
which a large copy moves as many bytes as a step has to read: weights, without the input embedding, and keys and values.

kvpress needs an older transformers, so it decodes in a process of its own, by packages in a folder that
`--kvpress-site` names: `pip install --no-deps --target FOLDER` of kvpress, transformers 5.2, and what these lack here.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hardkv
from eval.machine import gpu
from eval.speed.events import synthetic_curves
from eval.speed.inputs import Setting, make_tiers
from eval.speed.kernel_time import Profiler
from eval.speed.timing import CudaTimer, copy_bandwidth, describe
from hardkv import Calibration, HardKVCache, graphed
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.cache.storage.queries import QueryRing
from hardkv.files import file_to_write, write_text
from hardkv.selectors import Risk, TopK

COMMON = {"num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 128, "max_position_embeddings": 1 << 18}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3-8b": lambda: Qwen3Config(
        **COMMON, vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36
    ),
    "qwen3-4b": lambda: Qwen3Config(
        **COMMON,
        **{"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        **COMMON, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32
    ),
}
# Name -> (what the cache is, further arguments of generate()).
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("dynamic", {}),
    "static-compile": ("static", {}),
    "topk-eager": ("topk", {}),
    "topk": ("topk", {"custom_generate": graphed}),
    "topk-compile": ("topk", {"custom_generate": graphed, "compile": True}),
    "risk": ("risk", {"custom_generate": graphed}),
    "risk-compile": ("risk", {"custom_generate": graphed, "compile": True}),
    "kvpress": ("kvpress", {}),
}
# Steps that are timed, after steps that are not. With events one falls among the latter, whose kernels are built then,
# and two among the former.
STEPS, WARM = 256, 140
SLOW_STEPS, SLOW_WARM = 40, 64  # of methods without events; the host's first steps in a process are slower
REPEATS = 3  # of a measurement, whose median is taken
PROFILED = 8  # steps, between two events
# Of the memory that is free beside the weights, what the largest batch's cache may take.
SHARE = 0.7


@dataclass(frozen=True)
class Case:
    """What is decoded: sequences of `context` columns; `batch` 0 is the largest that fits."""

    context: int
    batch: int
    kept: int = 2048


CASES = (
    *(Case(2048, batch) for batch in (32, 8, 1)),
    *(Case(8192, batch) for batch in (32, 1)),
    *(Case(32768, batch) for batch in (0, 8, 1)),
    Case(131072, 0),
)


class Clock(StoppingCriteria):
    """When each step came; ends after `steps` of them."""

    def __init__(self, steps: int):
        self.steps, self.times = steps, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), len(self.times) > self.steps, device=input_ids.device)


class ProfilingClock(Clock):
    """Also profiles the last `PROFILED` steps, once `steps` of them are over."""

    def __init__(self, steps: int):
        super().__init__(steps + PROFILED)
        self.first, self.profiler, self.found = steps, Profiler(), dict[str, Any]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        if len(self.times) == self.first:
            self.profiler.start()
        if len(self.times) == self.first + PROFILED:
            self.found = self.profiler.stop(PROFILED)
        return ended


class Bench:
    """One model on one device.

    Args:
        name: a key of `MODELS`. config: its config, or a smaller one. device: where it runs; with CUDA, timed there.
        kvpress_site: folder of kvpress and what it needs.
    """

    def __init__(
        self,
        name: str,
        config: PreTrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        kvpress_site: Path | None = None,
    ):
        self.name, self.config, self.device, self.kvpress_site = name, config, device, kvpress_site
        with device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.setting = Setting(
            device,
            dtype,
            heads=config.num_key_value_heads,
            group=config.num_attention_heads // config.num_key_value_heads,
            dim=config.head_dim,
        )
        self.weights = storage_nbytes(self.model.parameters())
        embedding = self.model.get_input_embeddings().weight
        self.read = self.weights - (0 if config.tie_word_embeddings else embedding.nbytes)
        self.curves = synthetic_curves(_shape(config), config.num_key_value_heads)

    # ------------------------------------------------------------------ caches

    def hardkv_cache(self, budget: str, kept: int, scorer: str = "snapkv") -> HardKVCache:
        """An empty cache whose budget keeps `kept` tokens of a head."""
        window, interval = self.setting.window, self.setting.interval
        options: dict[str, Any] = {"scorer": scorer, "window": window, "interval": interval}
        if budget != "risk":
            return HardKVCache(config=self.config, budget=TopK(kept), **options)
        ones = torch.ones(self.curves.loss.shape[:2])
        layers = list(range(self.config.num_hidden_layers))
        provenance = {"geometry": Traits.of(self.config).geometry, "layers": layers}
        provenance |= {"scorer": hardkv.HardKVConfig(scorer=scorer).to_dict()["scorer"], "window": window}
        calibration = Calibration(ones, ones, self.curves.counts, self.curves.loss.float(), None, provenance)
        return HardKVCache(config=self.config, budget=Risk(kept), calibration=calibration, **options)

    def filled(self, kind: str, case: Case, room: int) -> Any:
        """A cache of `case.context` columns, filled in; `room` more will come."""
        if kind == "dynamic":
            return self._fill(DynamicCache(config=self.config), case)
        if kind == "static":
            return self._fill(StaticCache(config=self.config, max_cache_len=case.context + room), case)
        cache = self.hardkv_cache(kind, case.kept)
        setting, heads = self.setting, self.setting.heads
        fill = setting.window
        protected = setting.window + cache.settings.sinks
        if kind == "risk":
            counts = Risk(case.kept).allocation(self.curves, case.context, protected)
        else:
            counts = torch.full((len(cache.layers), heads), min(case.kept, case.context))
        for idx, layer in enumerate(cache.layers):
            lengths = (counts[idx] - fill).clamp_min(1).repeat(case.batch)
            tiers = make_tiers(setting, lengths, fill, case.context, idx)
            layer.lazy_initialization(tiers.dense.keys, tiers.dense.values)
            queries = setting.normal(idx + 1000)(case.batch, heads * setting.group, setting.window, setting.dim)
            ring = QueryRing(queries, setting.window + 1)
            ring.append(queries, None, case.context - setting.window)
            layer.restore(replace(tiers, compressed_at=case.context, events=1), ring, setting.dim**-0.5)
        return cache

    def _fill(self, cache: Any, case: Case) -> Any:
        shape = case.batch, self.setting.heads, case.context, self.setting.dim
        for idx in range(self.config.num_hidden_layers):
            draw = self.setting.normal(idx)
            cache.update(draw(*shape), draw(*shape), idx)
        return cache

    def largest(self, kind: str, case: Case, room: int) -> int:
        """Sequences whose cache takes `SHARE` of what is free."""
        free = torch.cuda.mem_get_info()[0] * SHARE
        length = case.context + room
        if kind in ("dynamic", "static"):
            return int(free // (length * self.config.num_hidden_layers * self.setting.heads * self.setting.token_bytes))
        cache = self.hardkv_cache(kind, case.kept)
        budget, options = self._settings(cache)
        return hardkv.max_batch_size(
            self.config, budget, case.context, length, self.setting.dtype, memory=int(free), **options
        )

    def _settings(self, cache: HardKVCache) -> tuple[Any, dict[str, Any]]:
        """What a cache was made with, as `hardkv.plan` takes it."""
        names = ("scorer", "window", "interval", "calibration")
        return cache.settings.budget, {name: getattr(cache.settings, name) for name in names}

    def _plan(self, cache: HardKVCache, case: Case, room: int) -> int:
        """Bytes that `hardkv.plan` told of."""
        budget, options = self._settings(cache)
        lengths = case.context, case.context + room
        return hardkv.plan(self.config, budget, case.batch, *lengths, self.setting.dtype, **options).nbytes

    # ------------------------------------------------------------------ measurements

    def decode(self, method: str, case: Case, steps: int | None = None, repeats: int = REPEATS) -> dict[str, Any]:
        """Decode after a synthetic fill, `repeats` times: the run of median time, and the times of all in order."""
        if METHODS[method][0] == "kvpress":
            runs = self.kvpress(case, steps or STEPS, repeats)
        else:
            runs = [self._decode(method, case, steps) for _ in range(repeats)]
        ranked = sorted(runs, key=lambda run: run["step_ms"])
        return ranked[len(runs) // 2] | {"all_step_ms": [run["step_ms"] for run in runs]}

    def _decode(self, method: str, case: Case, steps: int | None) -> dict[str, Any]:
        kind, options = METHODS[method]
        has_events = kind not in ("dynamic", "static")
        steps, warm = steps or (STEPS if has_events else SLOW_STEPS), WARM if has_events else SLOW_WARM
        self._begin()
        largest = not case.batch
        batch = case.batch or self.largest(kind, case, warm + steps)
        case = replace(case, batch=batch)
        record: dict[str, Any] = {"measure": "decode", "method": method, "model": self.name, **asdict(case)}
        if largest:
            record["largest"] = True
        cache = self.filled(kind, case, warm + steps + 2)
        clock = Clock(warm + steps)
        self._generate(cache, case, clock, options)
        self._forget(kind)
        times = clock.times[warm:]
        each = [b - a for a, b in pairwise(times)]
        mean = (times[-1] - times[0]) / len(each)
        held = cache.nbytes() if isinstance(cache, HardKVCache) else _nbytes(cache)
        record |= {
            "steps": len(each),
            "step_ms": mean * 1e3,
            "median_ms": median(each) * 1e3,
            "tokens_per_s": batch / mean,
            "kv_bytes": held,
            "read_bytes": self.read + held,
        }
        if isinstance(cache, HardKVCache):
            stats = cache.stats()
            record |= {"events": stats.events - 1, "captures": stats.captures, "replays": stats.replays}
            record["plan_bytes"] = self._plan(cache, case, warm + steps)
        return record | self._peak()

    def first_token(
        self, method: str, scorer: str, length: int, batch: int, repeats: int = REPEATS, warm: int = 1
    ) -> dict[str, Any]:
        """Time of a real prompt and its first token: the median of `repeats` runs, after `warm` that do not count."""
        ids = torch.randint(5, self.config.vocab_size, (batch, length), device=self.device)
        times = []
        for _ in range(warm + repeats):
            self._begin()
            begun = time.perf_counter()
            self._first(ids, method, scorer)
            times.append(time.perf_counter() - begun)
        record = {"measure": "first token", "method": method, "scorer": scorer, "model": self.name, "context": length}
        return record | {"batch": batch, "seconds": median(times[warm:])} | self._peak()

    def _generate(self, cache: Any, case: Case, clock: Clock, options: dict[str, Any]) -> None:
        ids = torch.randint(5, self.config.vocab_size, (case.batch, case.context + 1), device=self.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: cache},
            max_new_tokens=clock.steps + 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
        self._wait()

    def _first(self, ids: torch.Tensor, method: str, scorer: str) -> None:
        """One token after a prompt."""
        dense = method == "dynamic"
        cache = DynamicCache(config=self.config) if dense else self.hardkv_cache("topk", 2048, scorer)
        options = {CACHE: cache} | METHODS[method][1]
        self.model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, **options)
        self._wait()

    def _forget(self, kind: str) -> None:
        """Let go of a cache that compiled graphs keep."""
        if kind == "static":
            torch.compiler.reset()
            vars(self.model).pop("_compiled_call", None)

    def _begin(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak(self) -> dict[str, Any]:
        return {"peak_bytes": torch.cuda.max_memory_allocated()} if self.device.type == "cuda" else {}

    def profile_step(self, method: str, case: Case) -> dict[str, Any]:
        """Where the device's time goes in a step without an event."""
        kind, options = METHODS[method]
        self._begin()
        cache, clock = self.filled(kind, case, SLOW_WARM + PROFILED + 2), ProfilingClock(SLOW_WARM)
        self._generate(cache, case, clock, options)
        self._forget(kind)
        return {"measure": "profile", "of": "step", "method": method, "model": self.name, **asdict(case)} | clock.found

    def profile_prompt(self, method: str, scorer: str, length: int, batch: int) -> dict[str, Any]:
        """Where the device's time goes from a prompt to its first token, events included."""
        ids = torch.randint(5, self.config.vocab_size, (batch, length), device=self.device)
        for _ in range(2):  # the first builds kernels
            self._begin()
            profiler = Profiler()
            profiler.start()
            self._first(ids, method, scorer)
            found = profiler.stop()
        record = {"measure": "profile", "of": "prompt", "method": method, "scorer": scorer, "model": self.name}
        return record | {"context": length, "batch": batch} | found

    def kvpress(self, case: Case, steps: int, repeats: int) -> list[dict[str, Any]]:
        """The runs of `decode`, by kvpress in a process of its own."""
        asked = {
            "config": self.config.to_diff_dict() | {"dtype": None},
            "device": str(self.device),
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "cases": [asdict(case)] * repeats,
            "warm": WARM,
            "steps": steps,
            "window": self.setting.window,
            "interval": self.setting.interval,
        }
        program = Path(__file__).with_name("kvpress_decode.py")
        self._begin()  # leaves the other process room
        run = subprocess.run(
            [sys.executable, "-P", str(program), json.dumps(asked)],
            env=os.environ | {"PYTHONPATH": str(self.kvpress_site)},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(run.stderr.strip().rpartition(chr(10))[2])
        what = {"measure": "decode", "method": "kvpress", "model": self.name}
        records = json.loads(run.stdout.strip().rpartition(chr(10))[2])
        return [what | record | {"read_bytes": self.read + record["kv_bytes"]} for record in records]


def _shape(config: PreTrainedConfig) -> Any:
    from eval.speed.events import QWEN

    return replace(QWEN, layers=config.num_hidden_layers)


def _nbytes(cache: Any) -> int:
    return storage_nbytes(each for layer in cache.layers for each in (layer.keys, layer.values))


def run(
    bench: Bench, methods: list[str], cases: list[Case], lengths: list[int], profile: bool = False
) -> Iterator[dict[str, Any]]:
    """The records of a model, one after the other; a measurement that fails says how."""
    for length in lengths:
        for method, scorer in (("dynamic", ""), ("topk", "snapkv"), ("topk", "attention")):
            what = {"method": method, "scorer": scorer, "context": length, "batch": 1}
            yield _tried(partial(bench.first_token, method, scorer, length, 1), measure="first token", **what)
            if profile:
                call = partial(bench.profile_prompt, method, scorer, length, 1)
                yield _tried(call, measure="profile", of="prompt", **what)
    for case in cases:
        for method in methods:
            if method == "kvpress" and not case.batch:
                continue  # nobody tells how many sequences fit
            what = {"method": method, **asdict(case)}
            yield _tried(partial(bench.decode, method, case), measure="decode", **what)
            if profile and case.batch and method != "kvpress":
                yield _tried(partial(bench.profile_step, method, case), measure="profile", of="step", **what)


def _tried(call: Callable[[], dict[str, Any]], **what: Any) -> dict[str, Any]:
    try:
        return call()
    except Exception as error:
        return what | {"error": describe(error)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default="eval/results/generate.json")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--cases", nargs="+", metavar="CONTEXTxBATCH", help="such as 2048x32; 32768x0: what fits")
    parser.add_argument("--first-token", nargs="*", type=int, default=[8192], metavar="LENGTH")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, of every case and prompt")
    parser.add_argument("--kvpress-site", type=Path, metavar="FOLDER", help="packages for kvpress (see above)")
    args = parser.parse_args()
    methods = [name for name in args.methods or METHODS if name != "kvpress" or args.kvpress_site is not None]
    if "kvpress" in (args.methods or ()) and "kvpress" not in methods:
        parser.error("kvpress needs --kvpress-site FOLDER: a folder with it and a transformers that it takes")
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and PyTorch finds none: run it on a machine with an NVIDIA GPU")
    cases = [Case(*map(int, case.split("x"))) for case in args.cases] if args.cases else list(CASES)
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(CudaTimer(), Setting(device, torch.bfloat16))
    bench = Bench(args.model, MODELS[args.model](), device, torch.bfloat16, args.kvpress_site)
    found: dict[str, Any] = {"machine": gpu(device), "copy_bytes_per_s": bandwidth, "records": []}
    if args.out.exists():
        earlier = json.loads(args.out.read_text())
        found["records"] = earlier["records"] if earlier["machine"] == found["machine"] else []
    for record in run(bench, methods, cases, args.first_token, args.profile):
        if "read_bytes" in record:
            record["limit_ms"] = record["read_bytes"] / bandwidth * 1e3
        found["records"] = [old for old in found["records"] if _key(old) != _key(record)] + [record]
        write_text(args.out, json.dumps(found, indent=1) + "\n")
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in record.items()}
        print(shown, flush=True)


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        record.get(name) for name in ("measure", "of", "model", "method", "scorer", "context", "batch", "kept")
    )


if __name__ == "__main__":
    main()

"""Measure the steps and prompts of one model on one device, with each method."""

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hardkv
from eval.speed.cases import METHODS, Case
from eval.speed.events import QWEN, synthetic_curves
from eval.speed.inputs import Setting, coded, make_tiers
from eval.speed.kernel_time import Profiler
from hardkv import Calibration, HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.cache.storage.queries import QueryRing
from hardkv.selectors import Risk, TopK

# Timed steps, after untimed ones. With events, one event falls among the untimed steps, which build its kernels,
# and two fall among the timed steps.
STEPS, WARM = 256, 140
SLOW_STEPS, SLOW_WARM = 40, 64  # for methods without events; the host's first steps in a process are slower
REPEATS = 3  # repeats of a measurement; the median counts
PROFILED = 8  # profiled steps, between two events
# Share of the memory free beside the weights that the largest batch's cache may use.
SHARE = 0.7


class Clock(StoppingCriteria):
    """Record the time of each step; stop after `steps` steps."""

    def __init__(self, steps: int):
        self.steps, self.times = steps, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), len(self.times) > self.steps, device=input_ids.device)


class ProfilingClock(Clock):
    """Also profile `PROFILED` steps after the first `steps` ones."""

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
        name: name of the model in records. config: config of the model.
        device: device of the model; a CUDA device is also timed there.
        kvpress_site: folder with kvpress and its dependencies.
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
        self.curves = synthetic_curves(replace(QWEN, layers=config.num_hidden_layers), config.num_key_value_heads)

    # ------------------------------------------------------------------ caches

    def hardkv_cache(self, budget: str, kept: int, scorer: str = "snapkv") -> HardKVCache:
        """Create an empty cache whose budget keeps `kept` tokens per head; "topk-4" keeps them at 4 bits."""
        window, interval = self.setting.window, self.setting.interval
        options: dict[str, Any] = {"scorer": scorer, "window": window, "interval": interval}
        if budget != "risk":
            bits = int(budget.partition("-")[2] or 16)
            return HardKVCache(config=self.config, budget=TopK(kept), bits=bits, **options)
        ones = torch.ones(self.curves.loss.shape[:2])
        layers = list(range(self.config.num_hidden_layers))
        provenance = {"geometry": Traits.of(self.config).geometry, "layers": layers}
        provenance |= {"scorer": hardkv.HardKVConfig(scorer=scorer).to_dict()["scorer"], "window": window}
        calibration = Calibration(ones, ones, self.curves.counts, self.curves.loss.float(), None, provenance)
        return HardKVCache(config=self.config, budget=Risk(kept), calibration=calibration, **options)

    def filled(self, kind: str, case: Case, room: int) -> Any:
        """Create a cache filled with `case.context` columns; `room` more will follow."""
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
            if layer.codec is not None:
                tiers = coded(tiers, layer.codec)
            layer.restore(replace(tiers, compressed_at=case.context, events=1), ring, setting.dim**-0.5)
        return cache

    def _fill(self, cache: Any, case: Case) -> Any:
        shape = case.batch, self.setting.heads, case.context, self.setting.dim
        for idx in range(self.config.num_hidden_layers):
            draw = self.setting.normal(idx)
            cache.update(draw(*shape), draw(*shape), idx)
        return cache

    def largest(self, kind: str, case: Case, room: int) -> int:
        """Return the number of sequences whose cache needs `SHARE` of the free memory."""
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
        """Return the settings of a cache, in the form of `hardkv.plan`."""
        names = ("scorer", "window", "interval", "calibration", "bits")
        return cache.settings.budget, {name: getattr(cache.settings, name) for name in names}

    def _plan(self, cache: HardKVCache, case: Case, room: int) -> int:
        """Return the bytes that `hardkv.plan` predicts."""
        budget, options = self._settings(cache)
        lengths = case.context, case.context + room
        return hardkv.plan(self.config, budget, case.batch, *lengths, self.setting.dtype, **options).nbytes

    # ------------------------------------------------------------------ measurements

    def decode(self, method: str, case: Case, steps: int | None = None, repeats: int = REPEATS) -> dict[str, Any]:
        """Decode after a synthetic fill, `repeats` times; return the run of median time, and all times in order."""
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
        """Time a real prompt and its first token; return the median of `repeats` runs, after `warm` uncounted ones."""
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
        """Generate one token after a prompt."""
        dense = method == "dynamic"
        cache = DynamicCache(config=self.config) if dense else self.hardkv_cache("topk", 2048, scorer)
        options = {CACHE: cache} | METHODS[method][1]
        self.model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, **options)
        self._wait()

    def _forget(self, kind: str) -> None:
        """Release a cache that compiled graphs keep."""
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
        """Profile the device's time in a step without an event."""
        kind, options = METHODS[method]
        self._begin()
        cache, clock = self.filled(kind, case, SLOW_WARM + PROFILED + 2), ProfilingClock(SLOW_WARM)
        self._generate(cache, case, clock, options)
        self._forget(kind)
        return {"measure": "profile", "of": "step", "method": method, "model": self.name, **asdict(case)} | clock.found

    def profile_prompt(self, method: str, scorer: str, length: int, batch: int) -> dict[str, Any]:
        """Profile the device's time from a prompt to its first token, events included."""
        ids = torch.randint(5, self.config.vocab_size, (batch, length), device=self.device)
        for _ in range(2):  # the first run builds kernels
            self._begin()
            profiler = Profiler()
            profiler.start()
            self._first(ids, method, scorer)
            found = profiler.stop()
        record = {"measure": "profile", "of": "prompt", "method": method, "scorer": scorer, "model": self.name}
        return record | {"context": length, "batch": batch} | found

    def kvpress(self, case: Case, steps: int, repeats: int) -> list[dict[str, Any]]:
        """Run `decode` with kvpress in a separate process."""
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
        self._begin()  # leave memory for the other process
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


def _nbytes(cache: Any) -> int:
    return storage_nbytes(each for layer in cache.layers for each in (layer.keys, layer.values))

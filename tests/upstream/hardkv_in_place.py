"""A pytest plugin that puts a HardKVCache where transformers' own tests make a DynamicCache.

`tests.upstream.run` starts pytest with it (`-p hardkv_in_place --hardkv-cache CACHE --hardkv-report FILE`). The name
DynamicCache is replaced in transformers and so in its tests. Every test's record says how many caches it made, how
often attention went through one, and how often that had evicted, so that a test that never met a HardKVCache is not
counted as passed.

Three things are not as a user has them:
- The cache that an encoder-decoder keeps of its encoder stays a DynamicCache, as our documentation asks for.
- Tests of assisted decoding do not ask for attention weights, which a HardKVCache gives for the first forward only.
- Tests that read the keys and values of a layer get them, gathered from its tiers; and what a test itself hands to
  `update()` is attended at once, as a HardKVCache stores what attention brings.
"""

import json
import os
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, cache_utils

import hardkv
from hardkv import HardKVCache
from hardkv.cache.layer import HardKVLayer

DYNAMIC = cache_utils.DynamicCache
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},  # transformers' own
    # selections every 3 tokens that keep all
    "whole": {"scorer": "attention", "budget": 1_000_000, "window": 4, "sinks": 1, "interval": 3},
    # prompts have a few tokens
    "evicting": {"scorer": "attention", "budget": 2, "window": 1, "sinks": 0, "interval": 1},
}
# They compile a model around a StaticCache, which takes up to a minute
COMPILING = (
    "test_generate_compilation_all_outputs",
    "test_generate_compile_model_forward_fullgraph",
    "test_static_cache_no_recompile_with_smaller_length",
)

WITHOUT_WEIGHTS = ("test_assisted_decoding_", "test_prompt_lookup_decoding_")

counts = {"caches": 0, "attended": 0, "evicted": 0}
PATH = re.compile(r"(?<![\w:/.])/[\w.-]+/\S*")  # of one machine
PACKAGE = Path(hardkv.__file__).parent
records = pytest.StashKey[dict[str, Any]]()
reported: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hardkv")
    group.addoption("--hardkv-cache", choices=list(CACHES), default="dynamic", help="what DynamicCache becomes")
    group.addoption("--hardkv-report", help="JSON file of what each test did")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--hardkv-cache")
    if name != "dynamic":
        put_in_place(CACHES[name])
        for states in ("keys", "values"):
            setattr(HardKVLayer, states, gathered_for_tests(states))
        HardKVCache.update = attended_for_tests(HardKVCache.update)  # type: ignore[method-assign]


def put_in_place(settings: dict[str, Any]) -> None:
    """Replace DynamicCache in all modules of transformers that are loaded, and so in those that are not yet."""

    class Kind(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, DYNAMIC)

    class InPlace(DYNAMIC, metaclass=Kind):
        def __new__(
            cls, ddp_cache_data: Any = None, config: Any = None, offloading: bool = False, **kwargs: Any
        ) -> Any:
            if ddp_cache_data is not None:  # filled by hand: no attention brings it
                return DYNAMIC(ddp_cache_data, config=config, offloading=offloading, **kwargs)
            counts["caches"] += 1
            config = generating[-1] if generating else config
            return HardKVCache(config, offload=offloading, **settings)

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "transformers" and vars(module).get("DynamicCache") is DYNAMIC:
            module.DynamicCache = InPlace  # type: ignore[attr-defined]

    prepare = GenerationMixin._prepare_cache_for_generation
    # configs of models that make a cache: users pass them whole, generate() the decoder's part
    generating: list[Any] = []

    def prepared(model: Any, *args: Any, **kwargs: Any) -> Any:
        generating.append(model.config)
        try:
            return prepare(model, *args, **kwargs)
        finally:
            generating.pop()

    GenerationMixin._prepare_cache_for_generation = prepared  # type: ignore[method-assign]
    pair = cache_utils.EncoderDecoderCache.__init__

    def init(self: Any, *caches: Any) -> None:
        if len(caches) == 2 and isinstance(caches[1], HardKVCache) and not caches[1].get_seq_length():
            caches = (caches[0], DYNAMIC())
        pair(self, *caches)

    cache_utils.EncoderDecoderCache.__init__ = init  # type: ignore[method-assign]
    for method in ("prefill", "decode"):
        setattr(HardKVLayer, method, counted(getattr(HardKVLayer, method)))


def counted(function: Any) -> Any:
    def wrapper(layer: HardKVLayer, *args: Any, **kwargs: Any) -> Any:
        result = function(layer, *args, **kwargs)
        counts["attended"] += 1
        if layer.tiers is not None:
            rows = layer.tiers.lengths().view(-1, layer.num_kv_heads)
            counts["evicted"] += bool((rows < layer.tiers.tokens[:, None]).any())
        return result

    return wrapper


def is_test(frame: FrameType) -> bool:
    return f"{os.sep}tests{os.sep}" in frame.f_code.co_filename


def attended_for_tests(update: Any) -> Any:
    """`update()`, after which tests find the tokens stored."""

    def wrapper(cache: HardKVCache, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        handles = update(cache, keys, values, layer_idx, *args, **kwargs)
        layer = cache.layers[layer_idx]
        if not isinstance(layer, HardKVLayer) or not is_test(sys._getframe(1)):
            return handles
        new = handles[0].new
        if new.start:
            layer.decode(new, keys, None, None, None, scale=1.0, softcap=None, sinks=None)
        else:
            layer.prefill(new, keys, None, scale=1.0, softcap=None)
        return layer.keys, layer.values

    return wrapper


def gathered_for_tests(name: str) -> property:
    """A layer's `keys` or `values`, which code outside tests goes on to get as they are."""
    shown = getattr(HardKVLayer, name)

    def read(layer: HardKVLayer) -> Any:
        asked = is_test(sys._getframe(1)) and layer.tiers is not None
        return gathered(layer, name) if asked else shown.fget(layer)

    return property(read, shown.fset)


def gathered(layer: HardKVLayer, name: str) -> torch.Tensor:
    """Keys or values as DynamicCache has them, `[B, H, T, D]`, zero at pads and where a head has evicted."""
    tiers = layer.tiers
    assert tiers is not None
    assert not tiers.sparse.rows.total
    stored = "keys" if layer.latent else name
    old, new = getattr(tiers.condensed, stored), getattr(tiers.dense, stored)
    batch, heads = new.shape[:2]
    states = new.new_zeros(batch, heads, tiers.seen, new.shape[-1])
    row = tiers.condensed.rows.ids.long()
    states[row // heads, row % heads, tiers.condensed.positions.long()] = old
    for sequence, fill in enumerate(tiers.dense.fill.tolist()):
        states[sequence, :, tiers.dense.positions[sequence, :fill].long()] = new[sequence, :, :fill]
    if layer.latent:
        return states[..., : layer.head_dim] if name == "keys" else states[..., layer.head_dim :]
    return states


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a model's tests only those of generation, which every family inherits."""

    def is_chosen(item: pytest.Item) -> bool:
        if "models" not in item.path.parts:
            return True
        name = getattr(item, "originalname", None) or item.name
        mixins = [k for k in getattr(item, "cls", object).__mro__ if k.__name__ == "GenerationTesterMixin"]
        return any(name in vars(mixin) for mixin in mixins) and not name.startswith(COMPILING)

    chosen = [item for item in items if is_chosen(item)]
    left = [item for item in items if not is_chosen(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen


@pytest.fixture(autouse=True)
def asks_for_no_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    is_hardkv = request.config.getoption("--hardkv-cache") != "dynamic"
    if is_hardkv and request.node.name.startswith(WITHOUT_WEIGHTS) and hasattr(request.cls, "has_attentions"):
        monkeypatch.setattr(request.cls, "has_attentions", False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[records] = {"outcome": "passed", "errors": [], **dict.fromkeys(counts, 0)}
    counts.update(dict.fromkeys(counts, 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    record = item.stash.get(records, None)
    if record is None:
        return (yield)
    if call.when == "teardown":
        record.update(counts)
        item.user_properties.append(("hardkv", record))
    report = yield
    if report.failed:
        record["outcome"] = "failed"
        error = what_failed(call.excinfo)
        if error not in record["errors"]:
            record["errors"].append(error)
    elif report.skipped and record["outcome"] == "passed":
        record["outcome"] = "skipped"
    return report


def what_failed(excinfo: Any) -> dict[str, Any]:
    """Type and message, whether hardkv itself raised it, and the last line of a test."""
    last = excinfo.traceback[-1]
    tested = [entry for entry in excinfo.traceback if "tests" in Path(str(entry.path)).parts]
    at = tested[-1] if tested else last
    return {
        "type": excinfo.typename,
        "message": PATH.sub("...", str(excinfo.value).strip().partition("\n")[0])[:300],
        "refused": PACKAGE in Path(str(last.path)).parents and str(last.statement).lstrip().startswith("raise "),
        "at": f"{Path(str(at.path)).name}: {str(at.statement).strip().partition(chr(10))[0][:160]}",
    }


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        for name, record in report.user_properties:
            if name == "hardkv":
                reported[report.nodeid] = record


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        message = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
        error = {"type": "import", "message": message, "refused": False, "at": ""}
        reported[report.nodeid] = {"outcome": "failed", "errors": [error], **dict.fromkeys(counts, 0)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--hardkv-report")
    if path and not hasattr(session.config, "workerinput"):  # workers of pytest-xdist tell the one that started them
        Path(path).write_text(json.dumps(reported))

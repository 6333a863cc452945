"""Test ragged tiers in host memory between forwards: results are right, and tiers visit the device only when needed.

There is no second memory here, so the transfers are replaced: what is at home is scrambled, and whoever reads it there
computes nonsense, which the oracle notices. Transfers are counted, and copies on the device watched until they go.
"""

import contextlib
import copy
import io
import json
import weakref

import pytest
import torch

from hardkv import HardKVCache, HardKVConfig
from hardkv.cache.argument import CACHE
from hardkv.cache.storage import offload
from hardkv.selectors import AdaKV
from tests.cache.conftest import DEVICE
from tests.cache.following import Follower
from tests.cache.test_modes import EVICT, MODELS, MODES, extended, greedy, held, look_up, repetitive, step
from tests.models.tiny import tiny_model as make_model

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def scrambled(tensor: torch.Tensor) -> torch.Tensor:
    """Other numbers, bit by bit; twice is the original."""
    return (tensor.view(torch.int32) ^ 0x2AAAAAAA).view(torch.float32)


class Transfers:
    """Replace `to_host` and `to_device`."""

    def __init__(self):
        self.out = self.back = 0
        self.here: list[weakref.ref] = []  # copies on the device
        self.most = 0  # of them at any time, with tokens

    def to_host(self, tensor):
        self.out += 1
        return scrambled(tensor)

    def to_device(self, tensor, device):
        assert tensor.device == device  # nothing here has moved
        self.back += 1
        here = scrambled(tensor)
        if tensor.numel():
            self.here.append(weakref.ref(here))
        self.most = max(self.most, self.staying)
        return here

    @property
    def staying(self) -> int:
        self.here = [ref for ref in self.here if ref() is not None]
        return len(self.here)


@pytest.fixture
def transfers(monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("stands in for host memory, and there is host memory: see test_on_a_gpu")
    transfers = Transfers()
    monkeypatch.setattr(offload, "to_host", transfers.to_host)
    monkeypatch.setattr(offload, "to_device", transfers.to_device)
    return transfers


def offloading(model, name: str, **settings) -> tuple[HardKVCache, Follower]:
    cache = HardKVCache(config=model.config, offload=True, **(EVICT | settings))
    return cache, Follower(model, cache, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "attn"), MODELS)
def test_mode(mode, name, attn, transfers, tiny_model, tiny_prompts):
    model, inputs = tiny_model(name, attn), tiny_prompts(3)
    cache, follower = offloading(model, name, scorer="snapkv", patience=1)
    torch.manual_seed(0)
    tokens = mode(model, inputs, cache)
    assert follower.evicted >= 5
    assert transfers.out
    assert transfers.staying == 0
    plain = HardKVCache(config=model.config, scorer="snapkv", patience=1, **EVICT)
    torch.manual_seed(0)
    assert torch.equal(mode(model, inputs, plain), tokens)
    assert held(cache)[:3] == held(plain)[:3]


@pytest.mark.parametrize("patience", [0, 2])
def test_when_layers_come_and_go(patience, transfers, tiny_model, tiny_prompts):
    """A step brings each layer's two tiers once and takes nothing back; an event takes each layer's once."""
    model = tiny_model("qwen3")
    cache, _ = offloading(model, "qwen3", patience=patience)
    model(**tiny_prompts(1), **{CACHE: cache})
    layers, tensors = 3, 2 * 2  # keys and values of the condensed and the sparse tier
    assert (transfers.out, transfers.back) == (layers * tensors, 0)
    for index in range(1, 10):
        out, back = transfers.out, transfers.back
        step(model, cache, [20 + index])
        assert transfers.back - back == layers * tensors
        assert transfers.out - out == (layers * tensors if index % 3 == 0 else 0)
        assert transfers.staying == 0
    # never more than the layer that computes and the next one
    assert transfers.most == 2 * (tensors if patience else tensors // 2)


def test_the_next_layer_is_on_its_way_while_one_computes(transfers, tiny_model, tiny_prompts):
    model, seen = tiny_model("qwen3"), []
    cache, _ = offloading(model, "qwen3")
    model(**tiny_prompts(1), **{CACHE: cache})
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *args: seen.append(transfers.staying))
    step(model, cache, [20])
    assert seen == [2, 2, 0]  # after layer 0's and 1's attention: keys and values of the next one only


def test_held_events_crop_and_drafts(transfers, tiny_model):
    model = tiny_model("qwen3")
    cache, follower = offloading(model, "qwen3")
    tokens = look_up(model, "qwen3", cache)
    greedy(model, extended(repetitive(), tokens, [3, 4]), cache, max_new_tokens=8)
    assert follower.evicted >= 11
    assert transfers.staying == 0
    cache, follower = offloading(model, "qwen3", scorer="snapkv")
    model(**repetitive(), **{CACHE: cache})
    for index in range(12):
        step(model, cache, [20 + index])
        if index % 4 == 3:
            cache.crop(-2)
    assert follower.evicted == 12


def test_layers_that_share_keys_and_values(transfers, tiny_prompts):
    """Gemma 3n's last layers read what an earlier layer stored: its tiers come again."""
    model = make_model("gemma3n_text")
    plain, away = (HardKVCache(config=model.config, offload=flag, **EVICT) for flag in (False, True))
    expected = greedy(model, tiny_prompts(3), plain, max_new_tokens=12)
    assert torch.equal(greedy(model, tiny_prompts(3), away, max_new_tokens=12), expected)
    assert away.lengths().equal(plain.lengths())
    assert transfers.back > transfers.out > 0
    assert transfers.staying == 0


@pytest.mark.parametrize("how", ["deepcopy", "saved"])
def test_copies(how, transfers, tiny_model, tiny_prompts):
    model, inputs = tiny_model("gemma3"), tiny_prompts(1)
    cache = HardKVCache(config=model.config, offload=True, patience=1, **EVICT)
    greedy(model, inputs, cache, max_new_tokens=6)
    if how == "deepcopy":
        twin = copy.deepcopy(cache)
    else:
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    mine, theirs = ({id(layer.offloading) for layer in c.layers if hasattr(layer, "tiers")} for c in (cache, twin))
    assert len(mine) == len(theirs) == 1  # one for all layers, and each cache its own
    assert not mine & theirs
    for index in range(7):
        assert torch.equal(step(model, twin, [20 + index]), step(model, cache, [20 + index]))
    assert held(twin) == held(cache)
    assert transfers.staying == 0


def test_rows_move_at_home(transfers, tiny_model, tiny_prompts):
    model, inputs = tiny_model("llama"), tiny_prompts(3)
    cache, follower = offloading(model, "llama", budget=AdaKV(9))
    model(**inputs, **{CACHE: cache})
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))
    mask = inputs["attention_mask"][[2, 0, 1]]
    for index in range(7):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        step(model, cache, [20 + index] * 3, mask)
    assert follower.evicted >= 6
    assert transfers.staying == 0


def test_a_step_that_fails_leaves_its_layer_at_home(transfers, monkeypatch, tiny_model, tiny_prompts):
    from hardkv.cache import layer as module

    model = tiny_model("llama")
    cache, _ = offloading(model, "llama")
    model(**tiny_prompts(1), **{CACHE: cache})
    monkeypatch.setattr(module, "attend_tiers", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        step(model, cache, [20])
    monkeypatch.undo()
    monkeypatch.setattr(offload, "to_host", transfers.to_host)
    monkeypatch.setattr(offload, "to_device", transfers.to_device)
    assert transfers.staying == 2  # the next layer's keys and values were on their way
    with pytest.raises(RuntimeError, match="stopped between layers"):
        step(model, cache, [20])
    cache.reset()
    assert transfers.staying == 0
    model(**tiny_prompts(1), **{CACHE: cache})
    step(model, cache, [20])
    assert transfers.staying == 0


def test_bytes_on_both_sides(tiny_model, tiny_prompts):
    """On the CPU both sides are one memory, and nothing is copied."""
    model = tiny_model("gemma3")
    plain, away = (HardKVCache(config=model.config, offload=flag, patience=1, **EVICT) for flag in (False, True))
    for cache in (plain, away):
        greedy(model, tiny_prompts(3), cache, max_new_tokens=8)
    tiers = [layer.tiers for layer in away.layers if hasattr(layer, "tiers")]
    ragged = [tier for each in tiers for tier in (each.condensed, each.sparse)]
    stats = away.stats()
    assert stats.host_nbytes == away.host_nbytes() == sum(tier.keys.nbytes + tier.values.nbytes for tier in ragged) > 0
    assert away.nbytes() == plain.nbytes() == stats.nbytes > stats.host_nbytes
    assert plain.stats().host_nbytes == 0
    assert "in host memory" in str(stats)
    assert "in host memory" not in str(plain.stats())
    assert stats.to_dict()["host_nbytes"] == stats.host_nbytes


def test_the_argument(tiny_model):
    for wrong in (1, "cpu", None):
        with pytest.raises(TypeError, match=f"offload={wrong!r} must be True or False"):
            HardKVCache(offload=wrong)
    settings = HardKVConfig.from_json(HardKVConfig(offload=True).to_json())
    assert json.loads(settings.to_json())["offload"] is True
    cache = HardKVCache(config=tiny_model("llama").config, **settings.to_dict())
    assert all(layer.offloading is cache.layers[0].offloading is not None for layer in cache.layers)
    for transformers_own in (lambda: cache.offload(0), lambda: cache.layers[0].prefetch()):
        with pytest.raises(NotImplementedError, match=r"HardKVCache\(..., offload=True\)"):
            transformers_own()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu(mode, tiny_model, tiny_prompts):
    """Test the real transfers: pinned host memory, and the same tokens and bits as without offloading."""
    model, inputs = tiny_model("qwen3").cuda(), {name: tensor.cuda() for name, tensor in tiny_prompts(3).items()}
    plain, away = (HardKVCache(config=model.config, offload=flag, patience=1, **EVICT) for flag in (False, True))
    with torch.device("cuda"):
        torch.manual_seed(0)
        expected = mode(model, inputs, plain)
        torch.manual_seed(0)
        assert torch.equal(mode(model, inputs, away), expected)
    assert held(away)[:3] == held(plain)[:3]
    for here, there in zip(plain.layers, away.layers, strict=True):
        for tier in ("condensed", "sparse"):
            mine, theirs = getattr(here.tiers, tier), getattr(there.tiers, tier)
            for name in ("keys", "values"):
                tensor = getattr(theirs, name)
                assert tensor.device.type == "cpu"
                assert tensor.is_pinned() or not tensor.numel()
                assert torch.equal(tensor, getattr(mine, name).cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_wait_for_what_leaves(tiny_model, tiny_prompts):
    """A copy of the cache is complete anyway."""
    model, inputs = tiny_model("llama").cuda(), {name: tensor.cuda() for name, tensor in tiny_prompts(3).items()}
    cache = HardKVCache(config=model.config, offload=True, **EVICT)
    model(**inputs, **{CACHE: cache})
    layer = cache.layers[0]
    layer.tiers = layer.offloading.arrive(0, layer.tiers, layer.device)
    here = layer.tiers.condensed
    layer.offloading.forget()  # so that it counts as new
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles, about half a second
    layer.tiers = layer.offloading.leave(0, layer.tiers)
    assert not torch.cuda.current_stream().query()
    twin = copy.deepcopy(cache).layers[0].tiers.condensed
    assert torch.equal(twin.keys, here.keys.cpu())
    assert torch.equal(twin.values, here.values.cpu())


class Stream:
    """Record the calls on a CUDA stream, in order."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} event {self.events}")
        return f"{self.name} event {self.events}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_the_order_on_streams(monkeypatch, tiny_model, tiny_prompts):
    """A layer's attention waits for its own copy and not for the next layer's; copies wait for memory to be free."""
    log, inside = [], []
    main = Stream("main", log)

    @contextlib.contextmanager
    def within(stream):
        inside.append(stream.name)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(offload, "to_device", lambda tensor, device: log.append(f"copy on {inside}") or tensor.clone())
    model, device = tiny_model("llama"), torch.device("cuda", 0)
    cache = HardKVCache(config=model.config, **EVICT)
    model(**tiny_prompts(1), **{CACHE: cache})
    moves, tiers = offload.Offload(), [layer.tiers for layer in cache.layers]
    moves.fetch(0, tiers[0], device)
    moves.fetch(1, tiers[1], device)
    here = moves.arrive(0, tiers[0], device)
    copies = ["copy on ['side']"] * 4
    bring = ["side waits for main", *copies]
    assert log == [*bring, "side event 1", *bring, "side event 2", "main waits for side event 1"]
    assert here.condensed.keys is not tiers[0].condensed.keys
    assert moves.leave(0, here).condensed is tiers[0].condensed  # nothing is copied back
    log.clear()
    moves.fetch(1, tiers[1], device)  # on its way already
    moves.fetch(2, tiers[2], device)
    moves.arrive(1, tiers[1], device)
    assert log == [*bring, "side event 3", "main waits for side event 2"]
    log.clear()
    moves.arrive(1, tiers[2], device)  # what was fetched is no longer what the layer holds
    assert log == [*bring, "side event 4", "main waits for side event 4"]

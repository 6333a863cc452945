"""Fingerprints: what changes them, and what must not."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hardkv.calibration.fingerprint import STRIDE, TENSORS, VALUES, _sample, fingerprint
from tests.cache import conftest as tiny

MODELS = ["llama", "gemma3", "gpt2"]


class Holder(nn.Module):
    """A module of these parameters."""

    def __init__(self, *tensors):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_parameter(f"p{i}", nn.Parameter(tensor, requires_grad=False))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (65,), (40, 30), (3, 50, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sample_is_of_known_places(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    flat, count = tensor.float().numpy().ravel(), max(tensor.numel(), 1)
    places = range(count) if count <= VALUES else [i * STRIDE % count for i in range(VALUES)]
    assert np.array_equal(_sample(tensor, {}).numpy(), flat[list(places)].view(np.int32))
    if len(shape) == 2:  # not contiguous
        assert torch.equal(_sample(tensor.T.contiguous().T, {}), _sample(tensor, {}))


@pytest.mark.parametrize("shape", [(32, 64), (4096, 4096), (49_152, 576), (8, 1024, 256)])
def test_a_sample_is_of_many_rows_and_columns(shape):
    count = int(np.prod(shape))
    tensor = torch.arange(count, dtype=torch.int64).view(shape)
    found = np.unravel_index(_sample(tensor, {}).view(torch.int64).numpy(), shape)
    for places, size in zip(found, shape, strict=True):
        assert len(set(places.tolist())) >= min(size, VALUES) // 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantised_values_count_exactly(dtype):
    values = torch.arange(2).repeat(5) if dtype == torch.bool else torch.arange(10) * 12
    large = torch.tensor([2**31 - 1, 2**31 - 2]) if dtype == torch.int32 else values[-2:]
    first = torch.cat([values, large]).to(dtype)
    second = first.clone()
    second[-1:] = first[-2:-1]
    if dtype == torch.bool:
        assert not torch.equal(first, second)
    assert fingerprint(Holder(first)) == fingerprint(Holder(first.clone()))
    assert fingerprint(Holder(first)) != fingerprint(Holder(second))


def test_subclasses_count_by_what_they_consist_of():
    a, b, c = (torch.randn(10, 10) for _ in range(3))
    both, plain = Holder(TwoTensor(a, b)), Holder(a, b)
    assert isinstance(both.p0, TwoTensor)
    assert fingerprint(both) == fingerprint(plain)
    assert fingerprint(both) != fingerprint(Holder(TwoTensor(a, c)))


def test_shapes_count():
    assert fingerprint(Holder(torch.ones(4, 6))) != fingerprint(Holder(torch.ones(6, 4)))


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_counts(name):
    model = tiny.make_model(name)
    before = fingerprint(model)
    assert before == fingerprint(copy.deepcopy(model)) == fingerprint(tiny.make_model(name))
    assert len(before) == 16
    assert fingerprint(tiny.make_model(name, seed=1)) != before
    for path, weight in model.named_parameters():
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.01).add_(0.01)
            assert fingerprint(model) != before, path
            weight.copy_(kept)
    assert fingerprint(model) == before


def test_a_rank_one_change_counts():
    """What merging an adapter adds, to a weight that is much larger than the sample."""
    weight = torch.randn(512, 512)
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(512, 1, generator=generator) @ torch.randn(1, 512, generator=generator)
    assert fingerprint(Holder(weight)) != fingerprint(Holder(weight + 1e-3 * change))


def test_dtypes_that_hold_the_values_agree():
    """A bfloat16 checkpoint on a GPU, and in float32 on a CPU."""
    model = tiny.make_model("llama", dtype=torch.bfloat16)
    found = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).float()) == found
    assert fingerprint(copy.deepcopy(model).double()) == found
    assert fingerprint(tiny.make_model("llama")) != found


def test_buffers_count_when_they_are_saved():
    module = Holder(torch.ones(3))
    module.register_buffer("kept", torch.full((3,), 5.0))
    module.register_buffer(
        "computed", torch.full((3,), 7.0), persistent=False
    )  # as rotary frequencies, which forwards change
    before = fingerprint(module)
    module.computed += 1
    assert fingerprint(module) == before
    module.kept += 1
    assert fingerprint(module) != before


def test_tied_weights_count_once():
    tied = tiny.make_model("llama", tie_word_embeddings=True)
    apart = copy.deepcopy(tied)
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach().clone())
    assert fingerprint(tied) == fingerprint(apart)


def test_many_weights_are_not_all_read(monkeypatch):
    module = Holder(*torch.arange(3.0 * TENSORS).view(-1, 1))
    read = []
    monkeypatch.setattr("hardkv.calibration.fingerprint._sample", lambda *args: read.append(1) or _sample(*args))
    assert fingerprint(module) != fingerprint(Holder(*torch.arange(3.0 * TENSORS).view(-1, 1) + 1))
    assert len(read) <= 2 * TENSORS


def test_weights_that_cannot_be_read():
    assert fingerprint(tiny.make_model("llama").to("meta")) is None
    assert fingerprint(Holder(torch.empty(0), torch.empty(0))) is None  # as a partitioned model between forwards
    assert fingerprint(nn.Module()) is None
    part = tiny.make_model("llama")
    part.lm_head.to("meta")
    assert fingerprint(part) is None


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("tied", [False, True])
def test_offloaded_weights_are_found(where, tied, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny.make_model("llama", tie_word_embeddings=tied)
    before, logits = fingerprint(model), model(torch.arange(5)[None]).logits
    if where == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert fingerprint(model) == before
    assert torch.equal(model(torch.arange(5)[None]).logits, logits)
    other = tiny.make_model("llama", seed=1, tie_word_embeddings=tied)
    accelerate.cpu_offload(other, execution_device="cpu")
    assert fingerprint(other) not in (before, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_agree_after_one_wait():
    model = tiny.make_model("llama").cpu()
    before = fingerprint(model)
    model.cuda()
    assert fingerprint(model) == before
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            fingerprint(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(each.message) for each in waits) == 1
    model.model.layers[0].cpu()
    assert fingerprint(model) == before


# ---------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """A linear layer with adapters of rank 2, by the attributes of PEFT's."""

    adapter_layer_names = ("lora_A", "lora_B", "not.there")

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.scaling, self.merged_adapters = base, {}, []
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ParameterDict()
        self.active_adapters, self.disable_adapters = [], False

    def add(self, name, seed):
        torch.manual_seed(seed)
        self.lora_A[name] = nn.Linear(self.base_layer.in_features, 2, bias=False)
        self.lora_B[name] = nn.Parameter(torch.randn(self.base_layer.out_features, 2))
        self.scaling[name] = 0.5

    def merge(self, name):
        change = self.scaling[name] * self.lora_B[name] @ self.lora_A[name].weight
        self.base_layer.weight.data += change.detach()
        self.merged_adapters.append(name)


def adapted_model():
    model = tiny.make_model("llama")
    plain, attention = fingerprint(model), model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    attention.q_proj.add("first", 1)
    attention.q_proj.add("second", 2)
    return model, attention.q_proj, plain


def test_adapters_count_while_they_are_in_use():
    model, layer, plain = adapted_model()
    found = {}
    for active in ([], ["first"], ["second"], ["first", "second"]):
        layer.active_adapters = active
        found[fingerprint(model)] = active
    assert len(found) == 4
    assert found[plain] == []
    layer.disable_adapters = True
    assert fingerprint(model) == plain
    layer.disable_adapters, layer.active_adapters = False, ["first"]
    before = fingerprint(model)
    layer.add("third", 3)
    assert fingerprint(model) == before
    layer.scaling["second"] = 2.0
    assert fingerprint(model) == before
    layer.scaling["first"] = 2.0
    assert fingerprint(model) != before


def test_an_adapter_may_have_any_name():
    model, layer, _ = adapted_model()
    layer.active_adapters = ["first"]
    before = fingerprint(model)
    layer.add("renamed", 1)
    layer.active_adapters = ["renamed"]
    assert fingerprint(model) == before


def test_a_merged_adapter_counts_by_what_it_made():
    model, layer, plain = adapted_model()
    layer.active_adapters = ["first"]
    apart = fingerprint(model)
    layer.merge("first")
    merged = fingerprint(model)
    assert merged not in (apart, plain)
    model.model.layers[1].self_attn.q_proj = layer.base_layer  # unloaded
    assert fingerprint(model) == merged


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model = tiny.make_model("llama")
    plain = fingerprint(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    first = fingerprint(model)
    wrapped.add_adapter("second", config)
    assert fingerprint(model) == first != plain
    wrapped.set_adapter("second")
    second = fingerprint(model)
    assert second not in (plain, first)
    with wrapped.disable_adapter():
        assert fingerprint(model) == plain
    wrapped.merge_adapter()
    merged = fingerprint(model)
    assert merged not in (plain, first, second)
    assert fingerprint(wrapped.merge_and_unload()) == merged

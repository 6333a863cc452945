"""Test models over several processes or devices: tensor parallel, data parallel, weights on disk."""

import datetime
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from hardkv import HardKVCache, calibrate, graphed
from hardkv.cache.argument import CACHE
from hardkv.cache.tensor_parallel import local_heads
from hardkv.selectors import AdaKV, Pyramid, Risk, TopK, TopP
from tests.cache.conftest import DEVICE, make_model, make_prompts
from tests.cache.test_modes import greedy
from tests.models.tiny import random_ids

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)

SIZES = {"window": 4, "sinks": 1, "interval": 3}
HEADS = {"num_key_value_heads": 4, "num_attention_heads": 8}
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
# What computes each head by itself, or by a plan that every process makes for all heads: the same as in one process.
ALIKE: dict[str, dict[str, Any]] = {
    "topk": {"budget": TopK(8)},
    "pyramid": {"budget": Pyramid(9, beta=3), "scorer": "snapkv", "patience": 1},
    # rkv's scores have one scale for all heads of a process
    "online": {"budget": TopP(0.6, floor=6, cap=12), "scorer": "attention", "calibration": "online"},
    "calibrated": {"budget": TopP(0.6, floor=6, cap=12), "scorer": "snapkv", "calibration": "file"},
    "risk": {"budget": Risk(9), "scorer": "snapkv", "calibration": "file"},
    "risk of layers": {"budget": Risk(9, scope="layer"), "scorer": "snapkv", "calibration": "file"},
    "risk, offloaded": {"budget": Risk(9), "scorer": "snapkv", "calibration": "file", "offload": True},
    "bits": {"budget": TopK(9), "bits": (4, 3), "patience": 1},
    "bits, risk": {"budget": Risk(9), "scorer": "snapkv", "calibration": "file", "bits": 4},
    "bits, means": {"budget": TopK(9), "scorer": "snapkv", "calibration": "file", "bits": 2},  # uses nothing else of it
}
# What shares a layer's tokens by its heads' scores: each process shares among its own.
APART: dict[str, dict[str, Any]] = {"adakv": {"budget": AdaKV(9, alpha=0.0)}}


def run(model: Any, settings: dict[str, Any], folder: str, **options: Any) -> dict[str, Any]:
    """Return the output of a generation and the tokens kept."""
    settings = SIZES | settings
    if settings.get("calibration") == "file":
        settings |= {"calibration": os.path.join(folder, "calibration.safetensors")}
    cache = HardKVCache(config=model.config, **settings)
    inputs = {name: each.to(model.device) for name, each in make_prompts(3).items()}
    tokens = greedy(model, inputs, cache, max_new_tokens=9, **options)
    kept = [[[head.tolist() for head in row] for row in cache.kept(idx)] for idx in range(3)]
    return {"tokens": tokens.cpu(), "kept": kept, "lengths": cache.lengths().cpu(), "events": cache.stats().events}


def tensor_parallel_process(rank: int, folder: str, backend: str) -> None:
    """Run one of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=100),
    )
    from transformers.distributed import DistributedConfig

    parallel = DistributedConfig(tp_size=2)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=parallel, dtype=torch.float32)
    results = {name: run(model, settings, folder) for name, settings in (ALIKE | APART).items()}
    if backend == "nccl":
        results["graphed"] = run(model, ALIKE["risk"], folder, custom_generate=graphed)
    try:
        calibrate(model, [torch.arange(2, 90)], interval=8, window=4, sinks=1, progress=False)
    except ValueError as error:
        results["calibrate"] = str(error)
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=TWO_GPUS)])
def tensor_parallel(request, tmp_path_factory):
    """Return the results of two processes and of one."""
    if request.param == "gloo" and DEVICE != "cpu":
        pytest.skip("these processes compute on the CPU")
    folder = str(tmp_path_factory.mktemp("tensor-parallel"))
    model = make_model("llama", **HEADS)
    model.save_pretrained(folder)
    texts = [random_ids(64, seed=seed) for seed in range(2)]
    calibration = calibrate(model, texts, scorer="snapkv", interval=8, window=4, sinks=1, progress=False)
    assert len(set(calibration.temperatures.flatten().tolist())) > 1
    calibration.save(os.path.join(folder, "calibration.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gloo":  # transformers takes GPUs where it sees any
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.multiprocessing.spawn(tensor_parallel_process, args=(folder, request.param), nprocs=2)
    if request.param == "nccl":
        model.cuda()
    ranks = [torch.load(os.path.join(folder, f"rank{rank}.pt"), weights_only=False) for rank in range(2)]
    return ranks, {name: run(model, settings, folder) for name, settings in (ALIKE | APART).items()}


@pytest.mark.parametrize("name", ALIKE)
def test_tensor_parallel_equals_one_process(name, tensor_parallel):
    """Each process keeps the same tokens of its heads as a single process: budgets are split like the heads."""
    ranks, whole = tensor_parallel
    expected = whole[name]
    assert expected["events"] >= 3
    for rank, result in enumerate(ranks):
        own = slice(2 * rank, 2 * rank + 2)
        assert result[name]["lengths"].shape == (3, 3, 2)
        assert result[name]["kept"] == [[row[own] for row in layer] for layer in expected["kept"]]
        assert torch.equal(result[name]["tokens"], expected["tokens"])
    if "risk" in name:
        assert len(set(expected["lengths"][0, 1].tolist())) > 1  # or the wrong part would not show


def test_graphed_in_every_process(tensor_parallel):
    """The graph captures the collectives too."""
    for result in tensor_parallel[0]:
        if "graphed" in result:
            assert result["graphed"]["kept"] == result["risk"]["kept"]
            assert torch.equal(result["graphed"]["tokens"], result["risk"]["tokens"])


def test_totals_of_shared_budgets_are_those_of_each_process(tensor_parallel):
    ranks, whole = tensor_parallel
    lengths = torch.cat([result["adakv"]["lengths"] for result in ranks], -1)
    since = 13 + 8 - 3 * whole["adakv"]["events"] + 3 - 13  # tokens after the last event
    for part in lengths.split(2, -1):
        assert (part[:, 1].sum(-1) == 2 * (9 + since)).all()
    assert (whole["adakv"]["lengths"][:, 1].sum(-1) == 4 * (9 + since)).all()
    assert not lengths.equal(whole["adakv"]["lengths"])


def test_calibrating_a_split_model_is_refused(tensor_parallel):
    for result in tensor_parallel[0]:
        assert "split over 2 processes" in result["calibrate"]
        assert "calibrate it whole" in result["calibrate"]


@pytest.mark.parametrize("name", ["risk", "calibrated", "bits, means"])
def test_heads_that_do_not_fit_the_calibration(name, tmp_path, tiny_prompts):
    """The cache cannot know which heads these are, so it refuses before storing anything."""
    model = make_model("llama", **HEADS)
    texts = [torch.arange(2, 66)]
    calibration = calibrate(model, texts, scorer="snapkv", interval=8, window=4, sinks=1, progress=False)
    part = make_model("llama", **(HEADS | {"num_key_value_heads": 2}))
    part.config.num_key_value_heads = 4  # as a sharded model's config says
    cache = HardKVCache(config=part.config, **(SIZES | ALIKE[name] | {"calibration": calibration}))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="brings 2 KV heads.*has 4.*calibration=None"),
    ):
        part(**tiny_prompts(1), **{CACHE: cache})
    assert cache.get_seq_length() == cache.nbytes() == 0


@pytest.mark.parametrize(("total", "local"), [(4, 3), (2, 4)])
def test_heads_that_no_number_of_processes_gives(total, local):
    with pytest.raises(ValueError, match=f"brings {local} KV heads and the calibration has {total}"):
        local_heads(torch.nn.Linear(2, 2), total, local)


PROGRAM = """
import sys
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import LlamaForCausalLM
from hardkv import HardKVCache
from hardkv.cache.argument import CACHE

torch.set_num_threads(1)
state = PartialState(cpu=True)
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
prompts = [list(range(2 + index, 20 + 2 * index)) for index in range(4)]
texts = []
with state.split_between_processes(prompts) as mine:
    assert len(mine) == 2
    for ids in mine:
        cache = HardKVCache(config=model.config, budget=8, window=4, sinks=1, interval=3)
        out = model.generate(torch.tensor([ids]), **{CACHE: cache}, max_new_tokens=9, do_sample=False)
        texts.append((ids, out[0].tolist(), cache.stats().events, state.process_index))
texts = gather_object(texts)
if state.is_main_process:
    torch.save(texts, sys.argv[2])
state.destroy_process_group()
"""


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    """Test data parallel: every process has its own model, caches and prompts."""
    pytest.importorskip("accelerate")
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    # its only way to start several processes without MPI; the program asks for the CPU
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
    ]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command = [*launch, str(tmp_path / "program.py"), str(tmp_path), str(tmp_path / "out.pt")]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "out.pt")
    assert [process for *_, process in results] == [0, 0, 1, 1]
    for ids, tokens, events, _ in results:
        cache = HardKVCache(config=model.config, budget=8, **SIZES)
        expected = greedy(model, {"input_ids": torch.tensor([ids])}, cache, max_new_tokens=9)
        assert tokens == expected[0].tolist()
        assert events == cache.stats().events == 3


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_weights_on_disk(name, tmp_path, tiny_prompts):
    """device_map: accelerate's hooks bring a module's weights, and move its arguments, right before it runs."""
    pytest.importorskip("accelerate")
    model = make_model(name)
    model.save_pretrained(tmp_path / "model")
    layers = range(model.config.num_hidden_layers)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in layers}
    spread = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert spread.model.layers[1].self_attn.k_proj.weight.device.type == "meta"  # at home on the disk
    for settings in ({"budget": 1000}, {"budget": 8, "patience": 1}, {"budget": 8, "offload": True}):
        caches = [HardKVCache(config=each.config, **SIZES, **settings) for each in (model, spread)]
        expected, actual = (
            greedy(each, tiny_prompts(3), cache) for each, cache in zip((model, spread), caches, strict=True)
        )
        assert torch.equal(actual, expected)
        assert caches[1].lengths().equal(caches[0].lengths())
        if settings["budget"] == 1000:
            assert torch.equal(actual, greedy(model, tiny_prompts(3), DynamicCache(config=model.config)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("how", ["auto", "layers in turn"])
def test_layers_on_two_gpus(name, how, tmp_path):
    """device_map: layers, and their parts of the cache, lie on different devices."""
    pytest.importorskip("accelerate")
    model = make_model(name).cuda()
    model.save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in model.parameters())
    places: dict[str, Any] = {"device_map": "auto", "max_memory": {0: int(0.7 * size), 1: 2 * size}}
    if how != "auto":
        device_map: dict[str, int] = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 0}
        device_map |= {f"model.layers.{index}": index % 2 for index in range(model.config.num_hidden_layers)}
        places = {"device_map": device_map}
    spread = type(model).from_pretrained(tmp_path, dtype=torch.float32, **places)
    assert {parameter.device.index for parameter in spread.parameters()} == {0, 1}
    inputs = {name: each.cuda() for name, each in make_prompts(3).items()}
    for settings in (
        {"budget": 1000},
        {"budget": TopK(8), "patience": 1},
        {"budget": AdaKV(8), "scorer": "rkv"},
        {"budget": TopP(0.6, floor=6, cap=12), "calibration": "online"},
        {"budget": 8, "offload": True},
    ):
        caches = [HardKVCache(config=each.config, **SIZES, **settings) for each in (model, spread)]
        expected, actual = (
            greedy(each, inputs, cache, max_new_tokens=20) for each, cache in zip((model, spread), caches, strict=True)
        )
        assert torch.equal(actual, expected)
        assert caches[1].lengths().cpu().equal(caches[0].lengths().cpu())
        assert {layer.device.index for layer in caches[1].layers} == {0, 1}
        if settings["budget"] == 1000:
            assert torch.equal(actual, greedy(model, inputs, DynamicCache(config=model.config), max_new_tokens=20))
    with pytest.raises(NotImplementedError, match="several devices"):
        greedy(spread, inputs, HardKVCache(config=spread.config, **SIZES), custom_generate=graphed)

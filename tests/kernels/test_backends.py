"""Test which kernels run where, and the warning when they cannot run."""

import warnings

import pytest
import torch

from hardkv.kernels import backends, scoring, similarity
from hardkv.kernels.attention import backend_for, check_backend
from hardkv.kernels.rows import Rows, cumulative

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._warn_once.cache_clear()
    backends._new_enough.cache_clear()
    yield
    backends._new_enough.cache_clear()  # forget the fake GPUs


@pytest.fixture
def gpu(monkeypatch):
    """Fake a GPU of the given capability for the dispatch."""

    def pretend(capability, triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(backends, "has_triton", lambda: triton)

    return pretend


def test_cpu_takes_the_references_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.kernels_for(CPU, torch.float32) == "torch"
        assert backend_for("auto", CPU, torch.float32) == "torch"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpus_take_triton(gpu, dtype):
    gpu((8, 0))
    assert backend_for("auto", GPU, dtype) == "triton"
    assert backend_for("triton", GPU, dtype) == "triton"


@pytest.mark.parametrize(
    ("capability", "triton", "dtype", "reason"),
    [
        ((7, 5), True, torch.float16, "Some GPU is older than compute capability 8.0"),
        ((9, 0), False, torch.float16, r"Triton is not installed: pip install 'hardkv\[triton\]'"),
        ((9, 0), True, torch.float64, "torch.float64 is not one of float16, bfloat16, float32"),
    ],
)
def test_a_gpu_without_triton_is_told_of_once(gpu, capability, triton, dtype, reason):
    gpu(capability, triton)
    with pytest.warns(UserWarning, match=reason):
        assert backend_for("auto", GPU, dtype) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_for("auto", GPU, dtype) == "torch"


def test_heads_that_are_too_large_to_score(gpu):
    """Heads of Gemma 4 and latents of MLA are too large to score, but Triton still attends and copies them."""
    gpu((9, 0))
    assert backends.kernels_for(GPU, torch.bfloat16, 256) == "triton"
    with pytest.warns(UserWarning, match="a head_dim of 576 is larger than the 256 that scoring takes"):
        assert backends.kernels_for(GPU, torch.bfloat16, 576) == "torch"
    assert backend_for("auto", GPU, torch.bfloat16) == "triton"


def test_the_interpreter_runs_anywhere(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    assert backends.kernels_for(CPU, torch.float32) == "triton"
    assert backends.kernels_for(CPU, torch.bfloat16) == "torch"


def test_names_are_checked(monkeypatch):
    with pytest.raises(ValueError, match=r"attention='tritn' is not available. Did you mean 'triton'\?"):
        check_backend("tritn")
    monkeypatch.setattr("hardkv.kernels.attention.has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"attention='triton' needs Triton: pip install"):
        check_backend("triton")
    monkeypatch.setattr("hardkv.kernels.attention.packages.installed", lambda: ())
    with pytest.raises(ValueError, match="attention='flash_attn' needs a flash_attn_varlen_func"):
        check_backend("flash_attn")
    check_backend("torch")
    check_backend("auto")


def test_a_backend_that_cannot_run_here():
    with pytest.raises(ValueError, match="attention='triton' cannot run here: Triton .*; take attention='auto'"):
        backend_for("triton", CPU, torch.float32)
    with pytest.raises(ValueError, match="attention='flash_attn' needs float16 or bfloat16 on a GPU"):
        backend_for("flash_attn", CPU, torch.float32)


@pytest.mark.parametrize("dim", [512, 576])
def test_what_scores_asks_for_its_head_dim(dim, monkeypatch):
    """Launching would fail here as it does on a GPU; test_ahead_of_time.py tests the sizes that fit."""
    for module in (scoring, similarity):
        monkeypatch.setattr(module, "kernels_for", lambda _, dtype, head_dim: "torch" if head_dim == dim else "triton")
    keys, rows = torch.randn(12, dim), Rows(cumulative(torch.tensor([7, 5])), 12, 7)
    scores = scoring.window_attention(
        torch.randn(1, 4, 3, dim),
        torch.arange(4, 7),
        torch.ones(1, 3, dtype=torch.bool),
        keys,
        torch.cat([torch.arange(7), torch.arange(5)]).int(),
        rows,
        num_kv_heads=2,
        scale=0.05,
    )
    assert scores.isfinite().all()
    assert similarity.mean_cosine(keys, rows).isfinite().all()

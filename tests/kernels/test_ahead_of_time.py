"""Test that all launched kernels compile for GPUs that are not present, and fit them.

A launcher gets CPU tensors and treats them as GPU tensors. Triton specialises a kernel for its arguments and compiles
it as for any launch; only the launch itself is skipped.
"""

import importlib
import os
import pkgutil
import re
import subprocess
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import hardkv.kernels  # noqa: E402
from hardkv.kernels.append import triton as append  # noqa: E402
from hardkv.kernels.attention import triton as attention  # noqa: E402
from hardkv.kernels.attention import triton_schedule as schedule  # noqa: E402
from hardkv.kernels.codes import Coding, code_width  # noqa: E402
from hardkv.kernels.codes import triton as codes  # noqa: E402
from hardkv.kernels.codes import triton_decode as decode  # noqa: E402
from hardkv.kernels.codes import triton_in_place as codes_in_place  # noqa: E402
from hardkv.kernels.compaction import triton as compaction  # noqa: E402
from hardkv.kernels.compaction import triton_in_place as in_place  # noqa: E402
from hardkv.kernels.layout import triton as layout  # noqa: E402
from hardkv.kernels.rows import Rows, cumulative  # noqa: E402
from hardkv.kernels.scoring import triton as scoring  # noqa: E402
from hardkv.kernels.scoring import triton_pooling as pooling_kernel  # noqa: E402
from hardkv.kernels.similarity import triton as similarity  # noqa: E402
from tests.kernels.scoring.test_reference import REDUCTIONS  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # the tools that come with Triton

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(
        not ((TOOLS / "ptxas").exists() and (TOOLS / "cuobjdump").exists()), reason="Triton has no CUDA assembler here"
    ),
]

# Maximum shared memory per block.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}
# Registers per multiprocessor.
REGISTERS = 1 << 16
# Maximum register spill per thread, in bytes: a few bytes cost little, beyond this ptxas has given up.
SPILLED = 1 << 10

DIMS = (64, 80, 96, 128, 256)
# All sizes where shared memory is scarcest, samples elsewhere; sm_89 differs from sm_86 only in the last step.
SHAPES = [
    *(("sm_86", dim, dtype) for dim, dtype in zip(DIMS, cycle(["float16", "bfloat16"]), strict=False)),
    *product(["sm_86"], [64, 128, 256], ["float32"]),
    ("sm_80", 128, "bfloat16"),
    ("sm_80", 64, "float32"),
    ("sm_89", 256, "float16"),
    ("sm_90", 64, "float16"),
    ("sm_90", 256, "bfloat16"),
    ("sm_90", 80, "float32"),
]
# Batch rows, KV heads, condensed tokens, dense slots.
B, H, N, C = 2, 2, 640, 256


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_STORE_BINARY_ONLY", "1")
        yield


@contextmanager
def pretended(arch, launch):
    """Treat CPU tensors as those of an `arch` GPU; replace `JITFunction.run` by `launch`."""
    capability = int(arch.removeprefix("sm_"))
    driver = SimpleNamespace(
        get_current_device=lambda: arch,  # compiled kernels are cached per device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(triton.runtime.driver), "active", driver)
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10))
        patch.setattr(JITFunction, "run", launch)
        yield


def usage(kernel, file):
    """Return registers and stack bytes per thread."""
    file.write_bytes(kernel.asm["cubin"])
    listed = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listed.stdout).groups()
    return int(registers), int(stack)


@pytest.fixture
def check(tmp_path):
    """Call a function, compile the kernels that it launches, and check that `arch` has the resources they need."""

    def check(arch, launches, *case):
        kernels = []
        run = JITFunction.run

        def compile_only(self, *args, grid, warmup, **settings):
            kernels.append(run(self, *args, grid=grid, warmup=True, **settings))

        with pretended(arch, compile_only):
            launches(*case)
        assert kernels
        for kernel in kernels:
            name, shared = kernel.name, kernel.metadata.shared
            registers, stack = usage(kernel, tmp_path / "cubin")
            assert shared <= SHARED_BYTES[arch], f"{name}: {shared} of {SHARED_BYTES[arch]} bytes of shared memory"
            assert registers * 32 * kernel.metadata.num_warps <= REGISTERS, f"{name}: {registers} registers a thread"
            assert stack <= SPILLED, f"{name}: {stack} bytes a thread in memory besides {registers} registers"

    return check


def cu_seqlens():
    return cumulative(torch.tensor([300, 40, 0, 300]))


def attend(dim, dtype, group, q_len, options, value_dim=None, bits=(16, 16)):
    dtype = getattr(torch, dtype)

    def vectors(*shape, width=dim):
        return torch.empty(*shape, width, dtype=dtype)

    stored = [
        vectors(N, width=width) if each == 16 else torch.empty(N, code_width(width, each), dtype=torch.uint8)
        for each, width in zip(bits, (dim, value_dim or dim), strict=True)
    ]
    coding = Coding(bits, torch.empty(N, 2, dtype=torch.float16), vectors(B * H), vectors(B * H))
    attention.ragged_attention(
        vectors(B, H * group, q_len),
        *stored,
        Rows(cu_seqlens(), N, 300),
        vectors(B, H, C),
        vectors(B, H, C, width=value_dim or dim),
        torch.zeros(B, C, dtype=torch.int32),
        torch.full((B,), 9),
        bound=9,
        start=1,
        scale=0.1,
        softcap=30.0 if "softcap" in options else None,
        sinks=torch.empty(H * group, dtype=dtype) if "sinks" in options else None,
        new_mask=torch.ones(B, q_len, C, dtype=torch.bool) if "new_mask" in options else None,
        coding=None if bits == (16, 16) else coding,
    )


def score(dim, dtype, group, reduce, options):
    dtype, window = getattr(torch, dtype), 32
    scoring.window_attention(
        torch.empty(B, H * group, window, dim, dtype=dtype),
        torch.arange(window),
        torch.ones(B, window, dtype=torch.bool),
        torch.empty(N, dim, dtype=dtype),
        torch.zeros(N, dtype=torch.int32),
        cu_seqlens(),
        num_kv_heads=H,
        scale=0.1,
        reduce=reduce,
        softcap=30.0 if "softcap" in options else None,
        exclude=torch.zeros(N, dtype=torch.bool) if "exclude" in options else None,
        sinks=torch.empty(H * group, dtype=dtype) if "sinks" in options else None,
    )


def lay_out(order):
    rows, older = Rows(cu_seqlens(), N, 300), cumulative(torch.tensor([260, 10, 0, 200]))
    tokens = torch.zeros(N, dtype=torch.int32), torch.zeros(N, dtype=torch.uint8)
    dense = torch.zeros(B, C, dtype=torch.int32), torch.zeros(B, dtype=torch.int64)
    layout.layout(rows, older, order, *tokens, *dense, C, window=32, sinks=4, pinned=0, front=4)


def assign():
    keep, stays = torch.zeros(2, N, dtype=torch.bool)
    layout.assign(keep, stays, torch.zeros(N, dtype=torch.uint8), Rows(cu_seqlens(), N, 300), patience=2)


def pool(pooling):
    excluded = torch.zeros(N, dtype=torch.bool)
    pooling_kernel.pool_rows(torch.zeros(N), excluded, cu_seqlens(), kernel_size=7, pooling=pooling)


def compare(dim, dtype):
    similarity.mean_cosine(torch.empty(N, dim, dtype=getattr(torch, dtype)), cu_seqlens(), 300)


def sources(dim, dtype, layout):
    dtype = getattr(torch, dtype)
    first, second = torch.empty(2, N, dim, dtype=dtype)
    dense = torch.empty(B, C, H, dim, dtype=dtype).transpose(1, 2)
    return first, second, dense if layout == "strided" else first


def gather_tiers(dim, dtype, layout):
    both = sources(dim, dtype, layout)
    address = torch.zeros(N, dtype=torch.int64)
    known = torch.zeros(N, dtype=torch.int32), torch.zeros(N, dtype=torch.uint8)
    compaction.gather_tiers(list(zip(both, both, strict=True)), address, address[:500], *known)


def gather_keys(dim, dtype, layout):
    compaction.gather_keys(sources(dim, dtype, layout), torch.zeros(N, dtype=torch.int64))


def compact(dim, dtype, layout):
    first, _, last = sources(dim, dtype, layout)
    last = last if last.dim() == 4 else last[None, None]
    address = torch.zeros(2 * N, dtype=torch.int64)
    known = [torch.zeros(size, dtype=dtype) for size in (N, 2 * N) for dtype in (torch.int32, torch.uint8)]
    held, told = known[:2], known[2:]
    in_place.compact([first, first.clone(), *held], (last, last), cu_seqlens(), address, address[:N], *told)


def gather_codes(dim, dtype, layout, bits):
    *held, dense = sources(dim, dtype, layout)
    dense = dense if dense.dim() == 4 else dense.view(B, H, -1, dim)
    tiers = [
        [each if b == 16 else torch.empty(N, code_width(dim, b), dtype=torch.uint8) for b in bits] for each in held
    ]
    centres = torch.empty(2, B * H, dim, dtype=dense.dtype)
    address = torch.zeros(N, dtype=torch.int64)
    known = torch.zeros(N, dtype=torch.int32), torch.zeros(N, dtype=torch.uint8)
    scales = torch.empty(2, N, 2, dtype=torch.float16)
    codes.gather_codes([*tiers, (dense, dense)], scales, centres, bits, address, address[:500], *known)


def compact_codes(dim, dtype, layout, bits):
    first, _, dense = sources(dim, dtype, layout)
    dense = dense if dense.dim() == 4 else dense.view(B, H, -1, dim)
    held = [first if b == 16 else torch.empty(N, code_width(dim, b), dtype=torch.uint8) for b in bits]
    known = [torch.zeros(size, dtype=dtype) for size in (N, 2 * N) for dtype in (torch.int32, torch.uint8)]
    tokens = *held, *known[:2], torch.empty(N, 2, dtype=torch.float16)
    centres, address = torch.empty(2, B * H, dim, dtype=dense.dtype), torch.zeros(2 * N, dtype=torch.int64)
    chosen = address, address[:N], *known[2:]
    codes_in_place.compact_codes(tokens, (dense, dense), centres, bits, cu_seqlens(), *chosen)


def gather_states(dim, dtype, layout, bits):
    *_, dense = sources(dim, dtype, layout)
    dense = dense if dense.dim() == 4 else dense.view(B, H, -1, dim)
    held = torch.empty(2, N, code_width(dim, bits), dtype=torch.uint8)
    scales = torch.empty(2, N, 2, dtype=torch.float16)
    centre, rows = torch.empty(B * H, dim, dtype=dense.dtype), Rows(cu_seqlens(), N, 300)
    out, address = torch.empty(N, dim, dtype=dense.dtype), torch.zeros(N, dtype=torch.int64)
    decode.gather_states([*held, dense], scales, centre, 0, bits, address, rows, out)


def cut():
    schedule.Schedule.make(cu_seqlens(), N, C, 400)


def add(dim, dtype, q_len, options):
    dense, new = (torch.empty(B, H, tokens, dim, dtype=getattr(torch, dtype)) for tokens in (C, q_len))
    append.append(
        dense,
        dense.clone(),
        torch.zeros(B, C, dtype=torch.int32),
        torch.zeros(B, dtype=torch.int64),
        new,
        new.clone(),
        3,
        torch.ones(B, q_len, dtype=torch.bool) if "valid" in options else None,
    )


def append_step(dim, dtype, group=8):
    dtype = getattr(torch, dtype)
    dense, new = torch.empty(B, H, C, dim, dtype=dtype), torch.empty(B, H, 1, dim, dtype=dtype)
    append.append_step(
        dense,
        dense.clone(),
        torch.zeros(B, C, dtype=torch.int32),
        torch.zeros(B, dtype=torch.int64),
        torch.empty(B, H * group, 33, dim, dtype=dtype),
        torch.tensor([3]),
        torch.empty(B, H * group, 1, dim, dtype=dtype),
        new,
        new.clone(),
    )


# Architecture, head dimension, dtype, query heads per KV head, new tokens, options.
ATTENTION = [
    # up to 16 queries per row
    *product(["sm_86"], DIMS, ["float16"], [4], [1], ["softcap+sinks"]),
    *product(["sm_86"], [64, 96, 256], ["float32"], [1], [1], ["plain"]),
    ("sm_80", 128, "bfloat16", 16, 1, "plain"),
    ("sm_90", 80, "float32", 1, 8, "plain"),
    # 32
    ("sm_86", 80, "bfloat16", 4, 8, "softcap+sinks+new_mask"),
    ("sm_86", 256, "float32", 4, 8, "plain"),
    ("sm_90", 128, "float16", 4, 8, "new_mask"),
    # 128, in blocks
    *product(["sm_86"], [64, 256], ["bfloat16"], [16], [8], ["plain"]),
    ("sm_86", 128, "bfloat16", 16, 8, "softcap+sinks+new_mask"),
    ("sm_86", 128, "float32", 16, 8, "plain"),
    ("sm_86", 256, "float32", 16, 8, "plain"),
    ("sm_80", 256, "bfloat16", 16, 8, "plain"),
    ("sm_89", 128, "float16", 16, 8, "plain"),
    ("sm_90", 64, "bfloat16", 16, 8, "plain"),
    ("sm_90", 256, "bfloat16", 16, 8, "softcap+sinks+new_mask"),
]
# Architecture, head dimension, dtype, query heads per KV head, reduction, options.
SCORING = [
    *((*shape, 4, reduce, "plain") for shape, reduce in zip(SHAPES, cycle(REDUCTIONS), strict=False)),
    *(("sm_86", 128, "bfloat16", group, "max_logits", "softcap+exclude") for group in (1, 16)),
    *((arch, 128, "bfloat16", 16, "max", "softcap+exclude+sinks") for arch in ("sm_86", "sm_90")),
]
# Architecture, head dimension, dtype, query heads per KV head, new tokens, options, bits of keys and values.
CODED = [
    *(("sm_86", 128, "bfloat16", 4, 1, "plain", bits) for bits in ((8, 4), (3, 2))),
    ("sm_80", 80, "float16", 4, 1, "softcap+sinks", (4, 16)),
    ("sm_86", 64, "float32", 1, 1, "plain", (16, 3)),
    ("sm_86", 64, "bfloat16", 16, 8, "new_mask", (4, 4)),
    ("sm_90", 128, "bfloat16", 4, 1, "plain", (4, 4)),
]
LAYOUTS = ("strided", "flat")
# Bits of keys and of values.
BITS = [(8, 4), (3, 2), (4, 16)]
# New tokens, options.
APPENDS = [(1, "plain"), (8, "plain"), (512, "valid")]


@pytest.mark.parametrize(
    ("arch", "dim", "dtype"), [*SHAPES[:4], ("sm_80", 128, "bfloat16"), ("sm_90", 256, "bfloat16")]
)
def test_append_step(check, arch, dim, dtype):
    check(arch, append_step, dim, dtype)


@pytest.mark.parametrize(("arch", "dim", "dtype", "group", "q_len", "options"), ATTENTION)
def test_attention(check, arch, dim, dtype, group, q_len, options):
    check(arch, attend, dim, dtype, group, q_len, options)


@pytest.mark.parametrize(("arch", "dim", "dtype", "group", "q_len", "options", "bits"), CODED)
def test_attention_over_codes(check, arch, dim, dtype, group, q_len, options, bits):
    check(arch, attend, dim, dtype, group, q_len, options, None, bits)


@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
def test_latent_attention(check, arch):
    """Test DeepSeek's MLA: latents of 512 followed by rotated keys of 64, one row for all heads."""
    check(arch, attend, 576, "bfloat16", 128, 1, "plain", 512)
    check(arch, add, 512, "bfloat16", 1, "plain")
    check(arch, gather_tiers, 512, "bfloat16", "strided")
    check(arch, gather_keys, 512, "bfloat16", "strided")


@pytest.mark.parametrize(("arch", "dim", "dtype", "group", "reduce", "options"), SCORING)
def test_window_attention(check, arch, dim, dtype, group, reduce, options):
    check(arch, score, dim, dtype, group, reduce, options)


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_pool_rows(check, arch, pooling):
    check(arch, pool, pooling)


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_schedule(check, arch):
    check(arch, cut)


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_layout(check, arch):
    check(arch, lay_out, None)
    check(arch, lay_out, torch.arange(N))
    check(arch, assign)


@pytest.mark.parametrize(("arch", "dim", "dtype"), SHAPES)
def test_similarity(check, arch, dim, dtype):
    check(arch, compare, dim, dtype)


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "layout"),
    [(*shape, layout) for shape, layout in zip(SHAPES, cycle(LAYOUTS), strict=False)],
)
@pytest.mark.parametrize("gather", [gather_tiers, gather_keys, compact])
def test_compaction(check, arch, dim, dtype, layout, gather):
    check(arch, gather, dim, dtype, layout)


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "layout", "bits"),
    [
        *((*shape, *case) for shape, *case in zip(SHAPES, cycle(LAYOUTS), cycle(BITS), strict=False)),
        *(("sm_90", 128, "bfloat16", "strided", bits) for bits in BITS),
        ("sm_90", 8, "float16", "flat", (3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("write", [gather_codes, compact_codes])
def test_writing_codes(check, arch, dim, dtype, layout, bits, write):
    check(arch, write, dim, dtype, layout, bits)


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "layout", "bits"),
    [
        *((*shape, *case) for shape, *case in zip(SHAPES, cycle(LAYOUTS), cycle([8, 4, 3, 2]), strict=False)),
        *product(["sm_80", "sm_90"], [128], ["bfloat16"], ["strided"], [8, 4, 3, 2]),
        *product(["sm_86"], [256, 512], ["bfloat16"], ["strided"], [8, 3]),
        ("sm_90", 8, "float16", "flat", 3),
    ],
)
def test_gathering_states(check, arch, dim, dtype, layout, bits):
    check(arch, gather_states, dim, dtype, layout, bits)


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "q_len", "options"),
    [(*shape, *case) for shape, case in zip(SHAPES, cycle(APPENDS), strict=False)],
)
def test_append(check, arch, dim, dtype, q_len, options):
    check(arch, add, dim, dtype, q_len, options)


def test_no_kernel_is_left_out():
    """The tests above launch every kernel: all functions that no other function calls, in every file."""
    found = pkgutil.walk_packages(hardkv.kernels.__path__, "hardkv.kernels.")
    modules = [importlib.import_module(module.name) for module in found]
    functions = {f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
    called = {name for function in functions for name in function.fn.__code__.co_names}
    launched = set()
    with pretended("sm_86", lambda self, *args, grid, warmup, **options: launched.add(self.__name__)):
        attend(64, "float16", 4, 1, "plain")
        attend(64, "float16", 4, 1, "plain", None, (4, 4))
        score(64, "float16", 4, "mean", "plain")
        pool("max")
        lay_out(None)
        assign()
        compare(64, "float16")
        gather_tiers(64, "float16", "flat")
        gather_keys(64, "float16", "flat")
        compact(64, "float16", "flat")
        gather_codes(64, "float16", "flat", (4, 4))
        compact_codes(64, "float16", "flat", (4, 4))
        gather_states(64, "float16", "flat", 4)
        add(64, "float16", 1, "plain")
        append_step(64, "float16")
    assert launched == {function.__name__ for function in functions} - called

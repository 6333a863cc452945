"""Test variable-length FlashAttention over both tiers against one float64 softmax over all tokens that a query sees.

All classes but the last run on the CPU with the fakes of `fake_packages`. FlashAttention-2 and
FlashAttention-3 are tested only with these, because the project has no machine with either; PyTorch's own and
FlashAttention-4 also run on a GPU where there is one.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hardkv.kernels.attention import dense_allowed, tiered_attention
from hardkv.kernels.attention.packages import PACKAGES, installed, resolve_package
from hardkv.kernels.attention.varlen import varlen_attention
from hardkv.kernels.rows import Rows, cumulative
from tests.kernels.attention.fake_packages import flash_attn_3_early, flash_attn_4
from tests.kernels.attention.test_reference import make_case

INF, NAN = float("inf"), float("nan")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 3e-3}  # relative, of the whole output


def widened(case, dim=8, value_dim=8, dtype=torch.float16):
    """Return the case with head dimensions that the packages accept, and numbers rounded to `dtype`."""
    rng = np.random.default_rng(0)

    def draw(like, width):
        return torch.tensor(rng.normal(size=(*like.shape[:-1], width))).to(dtype).double().numpy()

    return replace(
        case,
        query=draw(case.query, dim),
        keys=draw(case.keys, dim),
        values=draw(case.values, value_dim),
        dense_keys=draw(case.dense_keys, dim),
        dense_values=draw(case.dense_values, value_dim),
    )


@cache
def fixed_case(lengths, group, q_len):
    """Return a case and its expected result, the same for every fake."""
    case = widened(make_case(len(lengths) * group + q_len, lengths, batch=2, group=group, q_len=q_len))
    return case, case.expected()


def run(case, dtype=torch.float16, spare=0, mask=None, arrange=lambda *dense: dense, **options):
    """Run attention; `spare`: slack in the bounds on lengths and fill; `arrange`: layout of dense keys and values."""

    def tensor(array):
        return torch.tensor(array, dtype=dtype)

    positions, fill = torch.tensor(case.positions, dtype=torch.int32), torch.tensor(case.fill)
    bound = int(fill.max()) + spare
    if mask is None and case.new_mask is not None:
        new_mask = torch.tensor(case.new_mask)
        mask = dense_allowed(positions[:, :bound], fill, case.start, case.query.shape[2], new_mask)
    return varlen_attention(
        tensor(case.query),
        tensor(case.keys),
        tensor(case.values),
        cumulative(torch.tensor(case.lengths, dtype=torch.int64)),
        max(case.lengths) + spare if sum(case.lengths) else 0,
        *arrange(tensor(case.dense_keys), tensor(case.dense_values)),
        positions,
        fill,
        bound=bound,
        start=case.start,
        scale=case.scale,
        softcap=case.softcap,
        sinks=None if case.sinks is None else tensor(case.sinks),
        new_mask=mask,
        **options,
    )


def assert_matches(case, dtype=torch.float16, expected=None, **options):
    (out, lse), (expected_out, expected_lse) = run(case, dtype, **options), expected or case.expected()
    assert out.shape == expected_out.shape
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (out.double() - expected_out).norm() <= TOLERANCE[dtype] * expected_out.norm()
    assert torch.all(out[expected_lse == -torch.inf] == 0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)


class NoHostReads(TorchDispatchMode):
    """Fail when the host reads a tensor's content."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, func
        return func(*args, **(kwargs or {}))


class TestContract:
    """Test the contract of every package; FlashAttention-2 and -3 are tested only here."""

    @pytest.mark.parametrize("q_len", [1, 2, 4])
    @pytest.mark.parametrize("group", [1, 2, 3])
    @pytest.mark.parametrize("lengths", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 13, 3), (5, 0, 0, 2)], ids=str)
    def test_rows(self, fake, lengths, group, q_len):
        case, expected = fixed_case(lengths, group, q_len)
        assert_matches(case, expected=expected)

    @pytest.mark.parametrize(("lengths", "group", "q_len"), [((0, 400, 1, 7), 2, 1), ((2, 0, 1, 3), 16, 2)], ids=str)
    def test_giant_row_and_large_groups(self, fake, lengths, group, q_len):
        case, expected = fixed_case(lengths, group, q_len)
        assert_matches(case, expected=expected)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_random(self, fake, data):
        """Use any fills, padding, masks and sinks, and softcap where the package has it."""
        batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
        lengths = data.draw(st.lists(st.integers(0, 9), min_size=batch * heads, max_size=batch * heads))
        group, q_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
        seed = data.draw(st.integers(0, 2**32))
        rng = np.random.default_rng(seed)
        padding = data.draw(st.sampled_from([0.0, 0.4]))
        case = make_case(
            seed,
            lengths,
            batch,
            group=group,
            q_len=q_len,
            padding=padding,
            softcap=data.draw(st.sampled_from([None, 0.5, 20.0])) if PACKAGES[fake[0]].softcap else None,
            sinks=rng.normal(size=heads * group).astype(np.float16).astype(float) if data.draw(st.booleans()) else None,
            new_mask=rng.random((batch, q_len, q_len)) < 0.6 if data.draw(st.booleans()) else None,
        )
        assert_matches(widened(case), spare=data.draw(st.integers(0, 3)), padded=padding > 0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_dtypes(self, fake, dtype):
        assert_matches(widened(make_case(1, [9, 0, 1, 12], batch=2, q_len=2), dtype=dtype), dtype)

    @pytest.mark.parametrize("dim", [16, 256])
    def test_head_dims(self, fake, dim):
        assert_matches(widened(make_case(2, [9, 0, 1, 12], batch=2), dim=dim, value_dim=dim))

    @pytest.mark.parametrize("q_len", [1, 3])
    @pytest.mark.parametrize("garbage", [NAN, INF])
    def test_slots_behind_the_fill_may_hold_anything(self, fake, garbage, q_len):
        """FlashAttention-3 and -4 multiply values there by 0, and 0 * NaN is NaN."""
        case = widened(make_case(3, [3, 0, 5, 1], batch=2, q_len=q_len, old=[1, 4]))
        expected = case.expected()
        for b in range(2):
            case.dense_keys[b, :, case.fill[b] :] = garbage
            case.dense_values[b, :, case.fill[b] :] = garbage
        assert_matches(case, expected=expected)

    @pytest.mark.parametrize("spare", [0, 2, 100])
    def test_bounds_need_not_be_tight(self, fake, spare):
        assert_matches(widened(make_case(4, [3, 0, 5, 1], batch=2, q_len=2, capacity=20, old=[1, 4])), spare=spare)

    @pytest.mark.parametrize("which", ["keys", "values", "both"])
    @pytest.mark.parametrize("q_len", [1, 3])
    def test_dense_tier_that_is_not_contiguous(self, fake, which, q_len):
        """Use the memory layout of a model's keys, or a slice of a buffer."""

        def arrange(keys, values):
            inside = keys.transpose(1, 2).contiguous().transpose(1, 2)
            part = torch.cat([values, values], 2)[:, :, : values.shape[2]]
            return inside if which != "values" else keys, part if which != "keys" else values

        assert_matches(widened(make_case(5, [3, 0, 5, 1], batch=2, q_len=q_len, old=[1, 4])), arrange=arrange)

    @pytest.mark.parametrize("width", ["bound", "capacity"])
    def test_mask_says_nothing_of_slots_behind_the_fill(self, fake, width):
        """Queries never see these slots; the mask may be as wide as the fill's bound or as the tier."""
        q_len = 3
        new_mask = np.random.default_rng(0).random((2, q_len, q_len)) < 0.6
        case = widened(make_case(14, [3, 0, 5, 1], batch=2, q_len=q_len, old=[1, 4], new_mask=new_mask))
        bound = int(case.fill.max()) if width == "bound" else case.positions.shape[1]
        mask = torch.ones(2, q_len, bound, dtype=torch.bool)
        for b in range(2):
            for c, position in enumerate(case.positions[b, : case.fill[b]]):
                mask[b, :, c] = torch.tensor([case.sees(b, i, position) for i in range(q_len)])
        assert_matches(case, mask=mask)

    @pytest.mark.parametrize("q_len", [1, 2])
    @pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0, 2.0, 0.0])], ids=["no sinks", "sinks"])
    def test_nothing_stored(self, fake, sinks, q_len):
        """Without any token or dense slot, the result is 0, and lse is -inf or the sink."""
        case = widened(make_case(6, [0, 0, 0, 0], batch=2, capacity=0, old=[0, 0], q_len=q_len, sinks=sinks))
        case.fill[:] = 0
        out, lse = run(case, padded=True)
        assert torch.all(out == 0)
        assert out.shape == case.query.shape
        expected = torch.full((4,), -torch.inf) if sinks is None else torch.tensor(sinks).float()
        assert torch.equal(lse, expected[None, :, None].expand(2, -1, q_len))

    def test_one_sequence_without_dense_tokens(self, fake):
        """The gap of this sequence is its whole buffer."""
        case = widened(make_case(7, [4, 0, 2, 3], batch=2, old=[0, 5]))
        case.fill[0] = 0
        assert_matches(case, padded=True)

    def test_fewer_tokens_than_new_queries(self, fake):
        """`padded=False` rules this out, but the first queries then see nothing, as the packages define."""
        case = widened(make_case(8, [0, 0], batch=1, q_len=3, old=[0]))
        case.fill[0] = 2
        out, lse = run(case)
        assert torch.all(out[:, :, 0] == 0)
        assert torch.all(lse[:, :, 0] == -torch.inf)
        assert torch.all(lse[:, :, 1:].isfinite())

    @pytest.mark.parametrize(
        ("options", "calls"),
        [
            ({"q_len": 1}, [1, 2]),  # one query of two heads, then two queries of one head
            ({"q_len": 3}, [3, 3]),
            ({"q_len": 1, "padding": 0.5}, [1, 2]),  # a single query sees everything
            ({"q_len": 3, "padding": 0.5}, [3]),
            ({"q_len": 3, "new_mask": np.ones((2, 3, 3), dtype=bool)}, [3]),
        ],
        ids=["one", "three", "one, padded", "three, padded", "masked"],
    )
    def test_what_the_package_computes(self, fake, options, calls):
        """The package computes both tiers, but the dense tier only where its mask is causal in the package's sense."""
        case = widened(make_case(9, [3, 0, 5, 1], batch=2, old=[2, 4], **options))
        assert_matches(case, padded="padding" in options)
        assert fake[1] == calls

    @pytest.mark.parametrize("options", [{"q_len": 1}, {"q_len": 3}, {"q_len": 3, "padding": 0.5}], ids=str)
    def test_no_length_is_read_on_the_host(self, fake, options):
        case = widened(make_case(10, [3, 0, 5, 1], batch=2, old=[2, 4], **options))
        tensors = [torch.tensor(a).half() for a in (case.query, case.keys, case.values)]
        dense = [torch.tensor(a).half() for a in (case.dense_keys, case.dense_values)]
        cu_seqlens, positions = cumulative(torch.tensor(case.lengths)), torch.tensor(case.positions, dtype=torch.int32)
        fill, sinks = torch.tensor(case.fill), torch.zeros(4)
        bounds = {"bound": int(fill.max()), "start": case.start, "padded": "padding" in options}
        resolve_package(None, torch.float16, 8, 8, None)
        with NoHostReads():
            varlen_attention(*tensors, cu_seqlens, 5, *dense, positions, fill, scale=0.6, sinks=sinks, **bounds)

    def test_inputs_are_left_alone(self, fake):
        case = widened(make_case(11, [3, 0, 5, 1], batch=2, old=[2, 4]))
        dense = [torch.tensor(a).half() for a in (case.dense_keys, case.dense_values)]
        before = [tensor.clone() for tensor in dense]
        run(case, arrange=lambda keys, values: dense)
        for tensor, expected in zip(dense, before, strict=True):
            assert torch.equal(tensor, expected)


def test_values_of_another_width(install):
    """Only FlashAttention-4 accepts them."""
    install("flash_attn_4", flash_attn_4([]))
    assert_matches(widened(make_case(12, [3, 0, 5, 1], batch=2, q_len=2), dim=24, value_dim=16))


def test_flash_attn_3_without_lse(install):
    install("flash_attn_3", flash_attn_3_early([], returns_lse=False))
    with pytest.raises(RuntimeError, match="does not return the lse"):
        run(widened(make_case(13, [3, 5], batch=1)))


# ---------------------------------------------------------------------- the real packages


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("package", PACKAGES)
class TestOnTheGPU:
    """Test every package that is really installed, in bf16, against the reference in float64."""

    LENGTHS = (0, 1, 17, 128, 3000, 64, 0, 700)  # of two sequences

    @pytest.fixture(autouse=True)
    def really_installed(self, package):
        if package not in installed():
            pytest.skip(f"{package} is not installed")

    def inputs(self, seed, *, group=4, q_len=1, dim=64, capacity=320, fill=(250, 37), dtype=torch.bfloat16):
        """Return the positional arguments of `varlen_attention`; the new tokens are the last of the dense tier."""
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

        heads, total = len(self.LENGTHS) // 2, sum(self.LENGTHS)
        positions = torch.full((2, capacity), 10_000, dtype=torch.int32, device="cuda")
        for b, filled in enumerate(fill):
            positions[b, :filled] = torch.arange(5000 - filled, 5000, device="cuda")
        cu_seqlens = cumulative(torch.tensor(self.LENGTHS, device="cuda"))
        return (
            draw(2, heads * group, q_len, dim), draw(total, dim), draw(total, dim), cu_seqlens, max(self.LENGTHS),
            draw(2, heads, capacity, dim), draw(2, heads, capacity, dim), positions, torch.tensor(fill, device="cuda"),
        )  # fmt: skip

    def assert_matches(self, package, inputs, **options):
        query, keys, values, cu_seqlens, _, dense_keys, dense_values, positions, fill = inputs
        start = 5000 - query.shape[2]
        bound = int(fill.max())
        out, lse = varlen_attention(*inputs, bound=bound, start=start, scale=0.125, package=package, **options)
        expected_out, expected_lse = tiered_attention(
            query.double(), keys.double(), values.double(), Rows.of(cu_seqlens),
            dense_keys[:, :, :bound].double(), dense_values[:, :, :bound].double(),
            dense_allowed(positions[:, :bound], fill, start, query.shape[2], None), scale=0.125, **options,
        )  # fmt: skip
        assert out.dtype == query.dtype
        assert (out.double() - expected_out).norm() <= 3e-3 * expected_out.norm()
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("q_len", [1, 2, 4])
    @pytest.mark.parametrize("group", [1, 3, 4, 16])
    def test_groups_and_queries(self, package, group, q_len):
        self.assert_matches(package, self.inputs(group * 8 + q_len, group=group, q_len=q_len))

    @pytest.mark.parametrize("dim", [64, 96, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_head_dims(self, package, dim, dtype):
        self.assert_matches(package, self.inputs(dim, dim=dim, q_len=2, dtype=dtype))

    def test_sinks_and_softcap(self, package):
        softcap = 5.0 if PACKAGES[package].softcap else None
        sinks = torch.linspace(-2, 3, 16, device="cuda")
        self.assert_matches(package, self.inputs(1, q_len=2), sinks=sinks, softcap=softcap)

    @pytest.mark.parametrize("q_len", [1, 3])
    def test_slots_behind_the_fill_may_hold_anything(self, package, q_len):
        inputs = self.inputs(2, q_len=q_len)
        clean = varlen_attention(*inputs, bound=250, start=4999, scale=0.125, package=package)
        for b, filled in enumerate(inputs[-1].tolist()):
            for dense in inputs[5:7]:
                dense[b, :, filled:] = torch.nan
        found = varlen_attention(*inputs, bound=250, start=4999, scale=0.125, package=package)
        for tensor, expected in zip(found, clean, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)

    def test_new_tokens_only(self, package):
        """Attend with no condensed row, and a dense tier that the new tokens fill."""
        inputs = list(self.inputs(3, q_len=40, capacity=40, fill=(40, 40)))
        inputs[1:5] = inputs[1][:0], inputs[2][:0], torch.zeros_like(inputs[3]), 0
        self.assert_matches(package, inputs)

    @pytest.mark.parametrize("q_len", [1, 3])
    def test_no_length_is_read_on_the_host(self, package, q_len):
        inputs = self.inputs(4, q_len=q_len)
        options = {"bound": 250, "start": 5000 - q_len, "scale": 0.125, "package": package}
        varlen_attention(*inputs, **options)  # ignore what a package does at its first call, such as compiling
        torch.cuda.set_sync_debug_mode("error")
        try:
            varlen_attention(*inputs, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

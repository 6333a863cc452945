"""Test attention over codes against one softmax over the tokens that the codes stand for, in float64."""

import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels.attention import attend_tiers
from hardkv.kernels.codes import Coding, encode
from hardkv.kernels.rows import Rows
from tests.cache.plain_codes import quantised
from tests.kernels.attention.test_reference import Case, draw_case, make_case

DIM = 16
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@dataclass(frozen=True)
class CodedCase(Case):
    """Hold a case whose condensed keys and values are codes. `keys` and `values` are what they stand for."""

    codes: tuple = field(default=())
    coding: Coding | None = None

    def run(self, dtype=torch.float64, attention="torch"):
        """Run the operation that caches call, over codes."""

        def moved(states):
            states = torch.as_tensor(states, device=DEVICE)
            return states.to(dtype) if states.dtype == torch.float64 else states

        query, dense_keys, dense_values = map(moved, (self.query, self.dense_keys, self.dense_values))
        coding = Coding(self.coding.bits, *map(moved, self.coding[1:]))
        codes = map(moved, self.codes)
        found = attend_tiers(
            query,
            *codes,
            Rows.of(moved(torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32))),
            dense_keys,
            dense_values,
            moved(torch.tensor(self.positions, dtype=torch.int32)),
            moved(self.fill),
            bound=self.positions.shape[1],
            start=self.start,
            scale=self.scale,
            softcap=self.softcap,
            sinks=None if self.sinks is None else moved(self.sinks),
            new_mask=None if self.new_mask is None else moved(self.new_mask),
            coding=coding,
            attention=attention,
        )
        return tuple(each.cpu() for each in found)


def coded(bits):
    """Return a function that makes cases with codes of these bits; each row has its own centres."""

    def make(seed, lengths, batch, **options):
        case = make_case(seed, lengths, batch, **options)
        rng = np.random.default_rng(seed)
        case = replace(
            case,
            query=rng.normal(size=(*case.query.shape[:3], DIM)),
            dense_keys=rng.normal(size=(*case.dense_keys.shape[:3], DIM)),
            dense_values=rng.normal(size=(*case.dense_values.shape[:3], DIM)),
        )
        row = np.repeat(np.arange(len(lengths)), lengths)
        states, codes, scales, centres = [], [], [], []
        for each in bits:
            centre = torch.tensor(rng.normal(size=(len(lengths), DIM)) * 2).bfloat16().double().numpy()
            state = rng.normal(size=(sum(lengths), DIM)) + centre[row]
            code, scale = torch.tensor(state), torch.zeros(len(row), dtype=torch.float16)
            if each != 16:
                code, scale = encode(code, torch.tensor(centre[row]), each)
            read = [quantised(*token, each) for token in zip(state, centre[row], strict=True)]
            states.append(np.array(read).reshape(-1, DIM))
            codes.append(code)
            scales.append(scale)
            centres.append(torch.tensor(centre))
        return CodedCase(
            **vars(replace(case, keys=states[0], values=states[1])),
            codes=tuple(codes),
            coding=Coding(bits, torch.stack(scales, 1), *centres),
        )

    return make


BITS = [(8, 8), (4, 4), (3, 3), (2, 2), (4, 2), (16, 3), (8, 16)]


@pytest.mark.parametrize("bits", BITS, ids=str)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_against_one_softmax_over_what_the_codes_stand_for(bits, data):
    case = draw_case(data, coded(bits), batch=3, longest=9, group=4, q_len=4)
    (out, lse), (expected_out, expected_lse) = case.run(), case.expected()
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


def assert_near(case, dtype, attention):
    """Compare with float64 where inputs are exact in `dtype`, by what holds for every backend: 3e-3 of the norm."""
    for name in ("query", "dense_keys", "dense_values"):
        case = replace(case, **{name: torch.tensor(getattr(case, name)).to(dtype).double().numpy()})
    (out, lse), (expected, expected_lse) = case.run(dtype, attention), case.expected()
    assert (out.double() - expected).norm() <= 3e-3 * expected.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_in_bfloat16(bits):
    assert_near(coded(bits)(7, [40, 0, 11, 300], batch=2, q_len=1), torch.bfloat16, "torch")


@pytest.fixture
def triton():
    pytest.importorskip("triton")
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")


@pytest.mark.usefixtures("triton")
class TestTriton:
    @pytest.mark.parametrize("bits", BITS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
    def test_bits(self, bits, dtype):
        if dtype == torch.bfloat16 and not GPU:
            pytest.skip("the interpreter multiplies bfloat16 as if it were integers")
        assert_near(coded(bits)(7, [40, 0, 11, 300], batch=2, q_len=1), dtype, "triton")

    @settings(max_examples=40 if GPU else 6, deadline=None)
    @given(data=st.data())
    def test_any_rows(self, data):
        bits = data.draw(st.sampled_from(BITS))
        assert_near(draw_case(data, coded(bits), batch=3, longest=90, group=12, q_len=4), torch.float16, "triton")

    @pytest.mark.parametrize("scale", [0.0, 6e-8, 60_000.0])
    def test_extreme_scales(self, scale):
        """Values of nothing but zeros, of the smallest and of nearly the largest scale of a float16."""
        case = coded((4, 4))(3, [20, 5], batch=1, q_len=1, padding=0.0)
        scales = case.coding.scales.clone()
        scales[:, 1] = scale
        states, row = [], torch.repeat_interleave(torch.arange(2), torch.tensor(case.lengths))
        for kind in (0, 1):
            coding = case.coding._replace(scales=scales)
            states.append(coding.states(kind, case.codes[kind], row).numpy())
        case = replace(case, keys=states[0], values=states[1], coding=coding)
        (out, _), (expected, _) = case.run(torch.float32, "triton"), case.expected()
        assert (out.double() - expected).norm() <= 3e-3 * expected.norm()

"""Test attention over codes against one softmax over the tokens that the codes stand for, in float64."""

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


@dataclass(frozen=True)
class CodedCase(Case):
    """Hold a case whose condensed keys and values are codes. `keys` and `values` are what they stand for."""

    codes: tuple = field(default=())
    coding: Coding | None = None

    def run(self, dtype=torch.float64, attention="torch"):
        """Run the operation that caches call, over codes."""
        tensors = (torch.tensor(each).to(dtype) for each in (self.query, self.dense_keys, self.dense_values))
        query, dense_keys, dense_values = tensors
        coding = self.coding._replace(
            key_centres=self.coding.key_centres.to(dtype), value_centres=self.coding.value_centres.to(dtype)
        )
        codes = (each if each.dtype == torch.uint8 else each.to(dtype) for each in self.codes)
        return attend_tiers(
            query,
            *codes,
            Rows.of(torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32)),
            dense_keys,
            dense_values,
            torch.tensor(self.positions, dtype=torch.int32),
            torch.tensor(self.fill),
            bound=self.positions.shape[1],
            start=self.start,
            scale=self.scale,
            softcap=self.softcap,
            sinks=None if self.sinks is None else torch.tensor(self.sinks).to(dtype),
            new_mask=None if self.new_mask is None else torch.tensor(self.new_mask),
            coding=coding,
            attention=attention,
        )


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


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_in_bfloat16(bits):
    """What holds for every backend, if the inputs are exact: an error of 3e-3 of the result's norm."""
    case = coded(bits)(7, [40, 0, 11, 300], batch=2, q_len=1)
    for name in ("query", "dense_keys", "dense_values"):
        case = replace(case, **{name: torch.tensor(getattr(case, name)).bfloat16().double().numpy()})
    out, expected = case.run(torch.bfloat16)[0].double(), case.expected()[0]
    assert (out - expected).norm() / expected.norm() < 3e-3

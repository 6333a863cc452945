"""Test the Triton kernel against a loop over rows."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hardkv.kernels.layout import triton as layout
from tests.kernels.layout import test_reference as reference

GPU = torch.cuda.is_available()

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("block", [8, 1024])
def test_against_a_loop(block, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", block)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def check(data):
        reference.assert_matches(layout.layout, data, "cuda" if GPU else "cpu")
        reference.assert_assigns(layout.assign, data, "cuda" if GPU else "cpu")

    check()

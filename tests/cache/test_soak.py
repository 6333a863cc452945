"""Test a very long generation: the cache's memory does not grow, and its length stays exact."""

import gc
import resource
import sys

import pytest
import torch

from hardkv import HardKVCache
from hardkv.selectors import Adaptive
from tests.cache.plain import DIM, HEADS, LAYERS, Columns
from tests.cache.test_machine import CONFIG, attend

PROMPT, BUDGET, INTERVAL = 20, 16, 8


def peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@pytest.mark.parametrize("steps", [1_600, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_memory_is_flat_and_the_length_exact(steps, capsys):
    """One token at a time in two sequences, one of which had half a prompt; every measurement follows an event."""
    generator = torch.Generator("cpu").manual_seed(0)
    exists = torch.ones(2, PROMPT, dtype=torch.bool)
    exists[1, : PROMPT // 2] = False
    sizes = {"window": 4, "sinks": 2, "interval": INTERVAL, "patience": 1}
    cache = HardKVCache(config=CONFIG, budget=Adaptive(BUDGET), **sizes)
    attend(cache, Columns.random(exists, generator), exists)
    # a few different tokens, again and again, and one mask that is cut to length
    tokens = [Columns.random(torch.ones(2, 1, dtype=torch.bool), generator) for _ in range(61)]
    mask = torch.cat([exists, torch.ones(2, steps, dtype=torch.bool)], 1)
    measured = {}
    for step in range(1, steps + 1):
        attend(cache, tokens[step % 61], mask[:, : PROMPT + step])
        if step % (steps // 4) == 0:
            gc.collect()
            tensors = sum(type(item) is torch.Tensor for item in gc.get_objects())
            held = cache.nbytes() - 2 * (PROMPT + step)  # the last mask is kept, a byte per column and sequence
            measured[step] = (held, tensors, sys.getallocatedblocks(), peak_resident())
            assert cache.get_seq_length() == PROMPT + step
            assert [layer.tiers.tokens.tolist() for layer in cache.layers] == [[20 + step, 10 + step]] * LAYERS
            assert cache.stats().events == 1 + step // INTERVAL
            assert cache.dense_nbytes() == 2 * LAYERS * 2 * HEADS * DIM * 4 * (PROMPT + step)
            assert int(cache.lengths().sum()) == LAYERS * 2 * HEADS * BUDGET
            for heads in (heads for layer in range(LAYERS) for heads in cache.kept(layer)):
                assert all(positions[-4:].tolist() == list(range(16 + step, 20 + step)) for positions in heads)
    with capsys.disabled():
        print("\nsteps: (bytes of the cache, tensors, blocks of the interpreter, peak resident bytes)", measured)
    early, *_, last = measured.values()
    assert last[0] < 1.25 * early[0]  # how many tokens are on probation differs from event to event
    assert last[1] < early[1] + 20  # tiers that happen to be empty have fewer
    assert last[2] < early[2] + 2_000
    assert last[3] < early[3] + 32 * 2**20

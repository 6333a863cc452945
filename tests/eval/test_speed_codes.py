"""Test what the benchmarks of codes measure; the times come from a GPU."""

import pytest
import torch
from transformers import Qwen3Config

from eval.speed.bench import Bench
from eval.speed.cases import Case
from eval.speed.codes import BITS, measure
from eval.speed.inputs import Setting
from hardkv.cache.argument import CACHE

CPU = torch.device("cpu")


class Timer:
    """Call what is timed."""

    def eager(self, calls):
        self.outputs = [call() for call in calls]
        return 1.0

    def graph(self, calls, estimate):
        return estimate


@pytest.mark.parametrize("bits", BITS)
def test_attention_reads_as_many_bytes_as_bits_take(bits):
    timer = Timer()
    record = measure(timer, Setting(CPU, torch.float16, heads=2, group=3, dim=16), bits, batch=2, length=50)
    scales = 0 if bits == 16 else 4
    assert record["bytes"] == 2 * 2 * 50 * (2 * 16 * bits // 8 + scales)
    ((out, _),) = timer.outputs
    assert out.shape == (2, 6, 1, 16)
    assert out.isfinite().all()


def test_a_cache_filled_with_codes_decodes():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    config = Qwen3Config(num_key_value_heads=2, num_attention_heads=4, **sizes)
    bench, case = Bench("tiny", config, CPU, torch.float32), Case(600, 2, 300)
    cache = bench.filled("topk-4", case, 10)
    logits = bench.model(torch.ones(2, 1, dtype=torch.long), **{CACHE: cache}).logits
    assert logits.isfinite().all()
    assert cache.settings.bits == 4
    assert cache.nbytes() == pytest.approx(bench._plan(cache, case, 10), rel=0.05)

"""teacher_forced() against one plain forward, and against a loop that steps each cache by hand."""

import pytest
import torch
import torch.nn.functional as F

from eval.teacher_forced import Result, teacher_forced
from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.selectors import TopK
from tests.cache import conftest as tiny

STEP = 16
ELEMENT = 4 * 2 * 2 * 8 * 3  # bytes of a token: float32, keys and values, heads, head_dim, layers


def make_cache(model, n):
    return HardKVCache(config=model.config, budget=TopK(n), window=4, sinks=2, interval=STEP)


def make_ids(length, batch=2):
    return tiny.make_prompts(batch, length)["input_ids"].clamp_min(2)  # no padding


@torch.no_grad()
def plain_logits(model, ids):
    """`[B, n, V]` of one forward without a cache."""
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def stepped(model, ids, cache):
    """Logits `[B, n, V]`, and the cache's bytes after each step."""
    logits, nbytes = [], []
    for chunk in ids.split(STEP, 1):
        logits.append(model(input_ids=chunk, **{CACHE: cache}).logits)
        nbytes.append(cache.nbytes())
    return torch.cat(logits, 1), nbytes


def token_nll(logits, ids):
    """NLL of tokens 1, 2, ..., each by the logits before it, `[B, n - 1]`."""
    return F.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")


def first_counted(length, count_from):
    """The first step that starts at or behind a share of the text."""
    return next(start for start in range(0, length, STEP) if start >= count_from * length)


@pytest.mark.parametrize("length", [80, 81, 90])  # whole steps; a last token that is only a target; a short last step
def test_a_roomy_cache_costs_nothing(length):
    model, ids = tiny.make_model("llama"), make_ids(length)
    result = teacher_forced(model, ids, {"roomy": lambda: make_cache(model, 1000)}, step=STEP)["roomy"]
    expected = token_nll(plain_logits(model, ids), ids)[:, first_counted(length, 1 / 4) :].mean(1)
    assert result.dense_nll == pytest.approx(expected.tolist(), abs=1e-5)
    assert result.excess == pytest.approx([0, 0], abs=1e-5)
    assert result.kl == pytest.approx([0, 0], abs=1e-5)
    assert result.agreement == [1, 1]


@pytest.mark.parametrize("length", [80, 81, 90])
@pytest.mark.parametrize("count_from", [0.0, 0.25, 0.5])
def test_small_caches_against_a_stepped_loop(length, count_from):
    model, ids = tiny.make_model("llama"), make_ids(length)
    caches = {n: lambda n=n: make_cache(model, n) for n in (12, 24)}
    results = teacher_forced(model, ids, caches, step=STEP, count_from=count_from)
    counted = slice(first_counted(length, count_from), length - 1)
    dense = plain_logits(model, ids)
    log_p = dense[:, counted].double().log_softmax(-1)
    for n, result in results.items():
        ours, nbytes = stepped(model, ids, make_cache(model, n))
        log_q = ours[:, counted].double().log_softmax(-1)
        nll = token_nll(ours, ids)[:, counted].mean(1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(1)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1)
        assert result.nll == pytest.approx(nll.tolist(), abs=1e-5)
        assert result.kl == pytest.approx(kl.tolist(), abs=1e-5)
        assert min(result.kl) > 1e-3
        assert result.agreement == pytest.approx(same.tolist())
        excess = nll - token_nll(dense, ids)[:, counted].mean(1)
        assert result.excess == pytest.approx(excess.tolist(), abs=1e-5)
        steps = range(counted.start // STEP, -(-(length - 1) // STEP))  # a step without a target is not run
        assert result.nbytes == pytest.approx(sum(nbytes[i] for i in steps) / len(steps))
        held = [min((i + 1) * STEP, length - 1 if length % STEP == 1 else length) for i in steps]
        assert result.dense_nbytes == sum(held) / len(held) * ELEMENT * len(ids)
    assert results[12].nbytes < results[24].nbytes < results[24].dense_nbytes


def test_rows_of_a_batch_are_separate():
    model, ids = tiny.make_model("llama"), make_ids(70)
    caches = {"small": lambda: make_cache(model, 12)}
    both = teacher_forced(model, ids, caches, step=STEP)["small"]
    alone = [teacher_forced(model, row, caches, step=STEP)["small"] for row in ids.split(1)]
    for name in ("nll", "dense_nll", "kl", "agreement"):
        assert getattr(both, name) == pytest.approx([getattr(one, name)[0] for one in alone], abs=1e-5)
    assert both.nll[0] != pytest.approx(both.nll[1], abs=1e-3)


def test_excess_is_of_each_text():
    result = Result([3.0, 5.0], [2.5, 5.5], [0.0, 0.0], [1.0, 1.0], 1.0, 2.0)
    assert result.excess == [0.5, -0.5]

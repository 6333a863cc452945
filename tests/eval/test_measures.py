"""Measures of loss, through calibrate(), against float64 loops over the attention of one plain forward."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from eval import measures
from hardkv import calibrate
from tests.cache import conftest as tiny

LAYERS, HEADS, GROUP, HEAD_DIM = 2, 2, 2, 8
WINDOW, SINKS, INTERVAL = 8, 2, 16
LENGTH = 80  # of the text, what calibrate() uses: whole intervals


def noting_attention(module, query, key, value, attention_mask, scaling=None, *, biases, record, **kwargs):
    """Plain causal attention with a bias on each logit; weights and values go into `record`."""
    key, value = (x.repeat_interleave(GROUP, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = torch.softmax(logits + biases[module.layer_idx], -1)
    record[module.layer_idx] = weights[0].detach().numpy(), value[0].detach().numpy()
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("noting", noting_attention)


def make_text(length=90):  # calibrate() leaves the last ten out; the gradient's loss does not
    return torch.randint(2, tiny.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def dense():
    """Per layer, float64 arrays: weights `[Hq, T, T]`, values `[Hq, T, D]`, and d NLL / d logit `[Hq, T, T]`."""
    ids, record = make_text(), {}
    model = tiny.make_model("llama", "noting", dtype=torch.float64, num_hidden_layers=LAYERS)
    shape = (HEADS * GROUP, ids.shape[1], ids.shape[1])
    biases = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in range(LAYERS)]
    logits = model(input_ids=ids, use_cache=False, biases=biases, record=record).logits
    loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    slopes = torch.autograd.grad(loss, biases)
    return [(*record[layer], slopes[layer].numpy()) for layer in range(LAYERS)]


def risk(weights, head, counts, cost):
    """The loss of a head at every count, each simulated by itself: `cost(query_head, query, gone)`, a mean."""
    losses, group = [], range(head * GROUP, head * GROUP + GROUP)
    for count in counts:
        held, met, steps = set(), 0, []
        for end in range(INTERVAL, LENGTH, INTERVAL):
            received = weights[group, max(0, end - WINDOW) : end].mean((0, 1))
            new, met = set(range(max(met, SINKS), end - WINDOW)), end - WINDOW
            held = set(sorted(held | new, key=lambda t: -received[t])[: count - WINDOW - SINKS])
            if 4 * end >= LENGTH:
                gone = sorted(set(range(SINKS, end - WINDOW)) - held)
                steps.append(np.mean([cost(g, i, gone) for g in group for i in range(end, end + INTERVAL)]))
        losses.append(np.mean(steps))
    return losses


def make_costs(model, dense, layer):
    weights, values, slopes = dense[layer]
    projection = model.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()  # [hidden, Hq * D]

    def squared_value(g, i, gone):
        return sum(weights[g, i, t] ** 2 * (values[g, t] ** 2).sum() for t in gone)

    def output_error(g, i, gone):
        part, some = projection[:, g * HEAD_DIM : (g + 1) * HEAD_DIM], weights[g, i].copy()
        some[gone] = 0
        return ((part @ ((some / some.sum() - weights[g, i]) @ values[g])) ** 2).sum()

    def gradient(g, i, gone):
        return (slopes[g, i, gone] ** 2).sum()

    def size(g, i, gone):
        return ((projection[:, g * HEAD_DIM : (g + 1) * HEAD_DIM] @ (weights[g, i] @ values[g])) ** 2).sum()

    return {"squared value": squared_value, "output error": output_error, "gradient": gradient, "size": size}


def calibrated(model, measure):
    sizes = {"window": WINDOW, "sinks": SINKS, "interval": INTERVAL}
    return calibrate(model, [make_text()], scorer="attention", measure=measure, progress=False, **sizes)


@pytest.mark.parametrize("name", ["squared value", "output error", "gradient"])
def test_a_measure_is_what_the_tokens_gone_cost(name, dense):
    model = tiny.make_model("llama", num_hidden_layers=LAYERS)
    measure = {
        "squared value": lambda: measures.squared_value,
        "output error": lambda: measures.output_error(model, relative=False),
        "gradient": lambda: measures.gradient(model, make_text()),
    }[name]()
    found = calibrated(model, measure)
    counts = found.counts.tolist()
    assert len(counts) > 8
    for layer in range(LAYERS):
        cost = make_costs(model, dense, layer)[name]
        for head in range(HEADS):
            expected = risk(dense[layer][0], head, counts, cost)
            assert expected[0] > 0
            assert found.risk[layer, head].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6 * expected[0])


def test_relative_output_error_divides_each_step_by_its_output(dense):
    model, layer, head = tiny.make_model("llama", num_hidden_layers=LAYERS), 1, 0
    found = calibrated(model, measures.output_error(model, relative=True))
    costs, group = make_costs(model, dense, layer), range(head * GROUP, head * GROUP + GROUP)

    def relative(g, i, gone):  # the mean over a step's queries and group, over the mean of their outputs
        queries = range(i - i % INTERVAL, i - i % INTERVAL + INTERVAL)
        return costs["output error"](g, i, gone) / np.mean([costs["size"](a, b, []) for a in group for b in queries])

    expected = risk(dense[layer][0], head, found.counts.tolist()[::3], relative)
    assert found.risk[layer, head, ::3].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_utility_is_the_largest_weight_that_a_query_of_the_step_gives(dense):
    model, layer = tiny.make_model("llama", num_hidden_layers=LAYERS), 1
    found = calibrated(model, measures.long_horizon_utility(model))
    weights, values, _ = dense[layer]
    projection = model.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
    parts = projection.reshape(-1, HEADS * GROUP, HEAD_DIM)
    norms = np.array([[np.linalg.norm(parts[:, g] @ v) for v in values[g]] for g in range(HEADS * GROUP)])

    for head in range(HEADS):
        group = range(head * GROUP, head * GROUP + GROUP)

        def utility(g, i, gone, group=group):  # the same for all queries of a step and heads of a group
            queries = range(i - i % INTERVAL, i - i % INTERVAL + INTERVAL)
            most = [max(weights[a, b, t] * norms[a, t] for a in group for b in queries) for t in gone]
            return sum(most) / norms[:, : queries.stop].mean()

        expected = risk(weights, head, found.counts.tolist()[::3], utility)
        assert found.risk[layer, head, ::3].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_gradient_leaves_the_model_as_it_was():
    model = tiny.make_model("llama", num_hidden_layers=LAYERS)
    measures.gradient(model, make_text())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.self_attn.o_proj._forward_pre_hooks for layer in model.model.layers)

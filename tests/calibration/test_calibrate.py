"""calibrate() against float64 loops over the attention of one dense forward, and where its result goes."""

import copy
import gc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerFast,
)

import hardkv.calibration.calibrate
import hardkv.calibration.survey
from hardkv import Calibration, HardKVCache, calibrate
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.calibration.file import describe_scorer
from hardkv.calibration.survey import restack, squared_attention
from hardkv.selectors import Adaptive, Risk, TopP, fit_temperatures, get_scorer
from tests.cache import conftest as tiny

SIZES = {"window": 8, "sinks": 2, "interval": 16}
QUIET = {"progress": False}
HEADS = 2  # KV heads of the tiny models with grouped queries

# ---------------------------------------------------------------- what the model really attends to


def recording_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Plain causal attention; the weights `[Hq, T, T]` of full-attention layers go into `kwargs["record"]`."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    if sliding_window is not None:
        hidden |= ~torch.ones_like(hidden).triu(1 - sliding_window)
    logits = logits.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(logits, -1)
    if sliding_window is None:
        kwargs["record"][module.layer_idx] = weights[0].numpy()
    if (sinks := kwargs.get("s_aux")) is not None:  # a learned logit a head; the scorers do not see it
        sinks = sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1]
        kwargs["record"]["paid", module.layer_idx] = weights[0].numpy()
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("recording", recording_attention)


def attention_of(name, ids):
    """`{layer: weights [Hq, T, T]}` of the full-attention layers of a tiny float64 model."""
    record = {}
    with torch.no_grad():
        tiny.make_model(name, "recording", dtype=torch.float64)(input_ids=ids[None], use_cache=False, record=record)
    return record


def make_texts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, tiny.VOCABULARY, (length,), generator=generator) for length in lengths]


def gpt_oss():
    """Two layers with full attention and learned sinks."""
    config = GptOssConfig(
        **tiny.COMMON | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        num_local_experts=2,
        num_experts_per_tok=1,
        initializer_range=0.15,
    )
    config._experts_implementation = "eager"  # the others know no float64
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).double().eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.linspace(0, 3, 4, dtype=torch.float64)
    return model


# ---------------------------------------------------------------- oracles


def received(weights, end, window, heads):
    """A `[H, end]`: what the last `window` queries before column `end` pay to every token, mean over the group."""
    by_query = weights[:, max(0, end - window) : end, :end].mean(1)
    return by_query.reshape(heads, -1, end).mean(1)


def attention_scores(weights, end, window, heads):
    return np.log(received(weights, end, window, heads))


def snapkv_scores(weights, end, window, heads):
    """Max over the three neighbours on either side, the window left out."""
    raw = received(weights, end, window, heads)[:, : max(0, end - window)]
    pooled = [[row[max(0, t - 3) : t + 4].max() for t in range(len(row))] for row in raw]
    return np.log(np.pad(pooled, ((0, 0), (0, end - raw.shape[1])), constant_values=1e-30))


SCORES = {"attention": attention_scores, "snapkv": snapkv_scores}


def paid_later(weights, end, interval, heads):
    """What eviction at column `end` can cost, per token `[H, T]`: squared attention of the next `interval` queries.

    Mean over these queries and the group. This function alone says what risk is.
    """
    later = weights[:, end : end + interval] ** 2
    return later.mean(1).reshape(heads, -1, weights.shape[-1]).mean(1)


def kept_by(weights, scores, heads, head, counts, interval, window, sinks):
    """Of one text, event after event: its column, and the candidates that a head of each count keeps, sets."""
    held, met = [set() for _ in counts], 0
    for end in range(interval, weights.shape[-1], interval):
        z = scores(weights, end, window, heads)[head]
        candidates = range(sinks, end - window)
        new, met = {t for t in candidates if t >= met}, max(met, end - window)
        held = [
            set(sorted(some | new, key=lambda t: (-z[t], -t))[: count - window - sinks])
            for some, count in zip(held, counts, strict=True)
        ]
        yield end, held


def measured_risk(texts, scores, heads, counts, *, interval, window, sinks, paid_weights=None, paid=paid_later):
    """The risk curves `[H, K]` of one layer, each count simulated by itself, event after event.

    Args:
        texts: `weights [Hq, T, T]` of each. scores: one of SCORES. counts: protected tokens included.
        paid_weights: the model's own attention where that is not what scorers see, as `texts`.
        paid: what says what a token that is gone costs, as `paid_later`.
    """
    lost, steps = np.zeros((heads, len(counts))), 0
    for weights, truly in zip(texts, paid_weights or texts, strict=True):
        length = weights.shape[-1]
        measured = [end for end in range(interval, length, interval) if end * 4 >= length]
        steps += len(measured)
        for head in range(heads):
            for end, kept in kept_by(weights, scores, heads, head, counts, interval, window, sinks):
                if end in measured:
                    cost = paid(truly, end, interval, heads)[head]
                    gone = [set(range(sinks, end - window)) - some for some in kept]
                    lost[head] += [sum(cost[t] for t in tokens) for tokens in gone]
    return lost / steps


def fitting_samples(texts, scores, heads, *, interval, window, sinks):
    """`z, A, candidates`, each `[H, S, N]`, of every event of all texts that has candidates."""
    events = [(w, end) for w in texts for end in range(interval, w.shape[-1] + 1, interval) if end > window + sinks]
    width = max(end for _, end in events)
    z, reference = np.full((heads, len(events), width), -np.inf), np.zeros((heads, len(events), width))
    mask = np.zeros((heads, len(events), width), dtype=bool)
    for s, (weights, end) in enumerate(events):
        z[:, s, :end] = scores(weights, end, window, heads)
        reference[:, s, :end] = received(weights, end, window, heads)
        mask[:, s, sinks : end - window] = True
    return torch.tensor(z), torch.tensor(reference), torch.tensor(mask)


def top_p(z, reference, mask, p, temperature=1.0):
    """The fewest best candidates of one sample that, with the protected tokens, hold the mass p."""
    credit = float(reference[~mask].sum())
    share = np.sort(np.exp((z[mask] - z[mask].max()) / temperature))[::-1]
    held = credit + (1 - credit) * np.concatenate([[0.0], share.cumsum() / share.sum()])
    return int(np.argmax(held >= p)) if (held >= p).any() else len(share)


def medians(z, reference, mask, p, temperatures):
    """Over the samples of every head; of an even number the lower one."""
    z, reference, mask = z.numpy(), reference.numpy(), mask.numpy()
    found = []
    for h in range(len(z)):
        kept = sorted(top_p(z[h, s], reference[h, s], mask[h, s], p, temperatures[h]) for s in range(z.shape[1]))
        found.append(kept[(len(kept) - 1) // 2])
    return found


# ---------------------------------------------------------------- all counts at once


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3),
    arrivals=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    steps=st.lists(st.integers(1, 5), min_size=0, max_size=6),
)
def test_restack_is_every_count_by_itself(seed, rows, arrivals, steps):
    """A head that keeps c meets the new tokens with what it kept last time, and keeps the c best."""
    rng = np.random.default_rng(seed)
    edges = [sum(steps[:k]) for k in range(len(steps) + 1)]
    held = [[[] for _ in edges] for _ in range(rows)]
    order, total = torch.zeros(rows, 0, dtype=torch.int64), 0
    for count in [0, *arrivals]:  # nothing has left the window at first
        new = list(range(total, total + count))
        total += count
        rank = np.stack([rng.permutation(total + 3) for _ in range(rows)])  # three more tokens that are no candidates
        order = restack(order, torch.tensor(new, dtype=torch.int64).expand(rows, -1), torch.tensor(rank), edges)
        for row in range(rows):
            assert sorted(order[row].tolist()) == list(range(total))
            for i, keep in enumerate(edges):
                held[row][i] = sorted(held[row][i] + new, key=lambda t: rank[row][t])[:keep]
                assert sorted(order[row, :keep].tolist()) == sorted(held[row][i])


# ---------------------------------------------------------------- the curves and temperatures


class TestMeasurement:
    @pytest.mark.parametrize(
        ("name", "scorer", "sizes", "lengths"),
        [
            ("qwen3", "attention", SIZES, [150, 97]),  # neither a multiple of the interval
            ("llama", "snapkv", SIZES, [112]),
            ("llama", "attention", {"window": 12, "sinks": 3, "interval": 5}, [61, 42]),
            ("llama", "attention", {"window": 1, "sinks": 0, "interval": 24}, [96]),
            ("gpt2", "snapkv", SIZES, [80, 128]),  # no groups
            ("gemma3", "attention", SIZES, [96]),  # every second layer has a sliding window
        ],
    )
    def test_risk_curves(self, name, scorer, sizes, lengths):
        model, texts = tiny.make_model(name, dtype=torch.float64), make_texts(*lengths)
        found = calibrate(model, texts, scorer=scorer, **sizes, **QUIET)
        recorded = [attention_of(name, ids[: len(ids) // sizes["interval"] * sizes["interval"]]) for ids in texts]
        heads = found.risk.shape[1]
        assert found.provenance["layers"] == list(recorded[0]) == ([1, 3] if name == "gemma3" else [0, 1, 2])
        counts = found.counts.tolist()
        assert counts[0] == sizes["window"] + sizes["sinks"]
        assert found.provenance["length"] == max(record[1].shape[-1] for record in recorded)
        assert counts[-1] == found.provenance["length"] - sizes["interval"]  # the longest context with later queries
        assert max(np.diff(counts)) <= max(4, counts[-1] // 16)
        for rank, layer in enumerate(recorded[0]):
            weights = [record[layer] for record in recorded]
            expected = measured_risk(weights, SCORES[scorer], heads, counts, **sizes)
            assert (np.diff(expected) <= 1e-15).all()
            assert expected[:, 0].min() > 1e-4
            torch.testing.assert_close(found.risk[rank].double(), torch.tensor(expected), rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("name", ["qwen3", "gemma3"])
    def test_means_of_keys_and_values(self, name):
        """Of all tokens but the sinks, as DynamicCache holds them."""
        model, texts = tiny.make_model(name, dtype=torch.float64), make_texts(100, 64)
        found = calibrate(model, texts, scorer="attention", **SIZES, **QUIET)
        for rank, layer in enumerate(found.provenance["layers"]):
            for kind, means in (("keys", found.key_means), ("values", found.value_means)):
                parts = []
                for ids in texts:
                    cache = DynamicCache(config=model.config)
                    whole = len(ids) // SIZES["interval"] * SIZES["interval"]
                    model(input_ids=ids[None, :whole], **{CACHE: cache})
                    parts.append(getattr(cache.layers[layer], kind)[0, :, SIZES["sinks"] :])
                expected = torch.cat(parts, 1).mean(1)
                torch.testing.assert_close(means[rank].double(), expected, rtol=1e-5, atol=1e-6)

    def test_learned_sinks(self):
        """GPT-OSS: they take part in what later queries pay."""
        model, (ids,) = gpt_oss(), make_texts(96)
        found = calibrate(model, [ids], scorer="attention", **SIZES, **QUIET)
        record = {}
        model.config._attn_implementation = "recording"
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False, record=record)
        for layer in range(2):
            plain, paid = [record[layer]], [record["paid", layer]]
            arguments = (plain, attention_scores, HEADS, found.counts.tolist())
            expected = torch.tensor(measured_risk(*arguments, **SIZES, paid_weights=paid))
            torch.testing.assert_close(found.risk[layer].double(), expected, rtol=1e-5, atol=1e-9)
            assert (expected[:, 0] < 0.99 * torch.tensor(measured_risk(*arguments, **SIZES))[:, 0]).all()

    def test_plain_mean_over_steps(self):
        """Steps whose context is too short for a count say that nothing is lost there."""
        model, (long, short) = tiny.make_model("llama", dtype=torch.float64), make_texts(160, 48)
        alone = calibrate(model, [long], **SIZES, **QUIET)
        other = calibrate(model, [short], **SIZES, **QUIET)
        both = calibrate(model, [long, short], **SIZES, **QUIET)
        assert torch.equal(both.counts, alone.counts)
        assert other.counts[-1] == 32 < both.counts[-1]
        # contexts 48 (a quarter is 40), 64, ..., 144 of the long one; 16 and 32 of the short one
        steps = {"long": 7, "short": 2}
        far = both.counts >= 32
        scaled = alone.risk[..., far] * steps["long"] / sum(steps.values())
        torch.testing.assert_close(both.risk[..., far], scaled, rtol=1e-5, atol=0)
        first = (alone.risk[..., 0] * steps["long"] + other.risk[..., 0] * steps["short"]) / sum(steps.values())
        torch.testing.assert_close(both.risk[..., 0], first, rtol=1e-5, atol=0)

    def test_heads_and_layers_differ(self):
        """Or the comparison above could not tell them apart."""
        risk = calibrate(tiny.make_model("qwen3"), make_texts(112), **SIZES, **QUIET).risk
        assert len({round(value, 5) for value in risk[:, :, 0].flatten().tolist()}) == risk[:, :, 0].numel()

    @pytest.mark.parametrize("scorer", ["attention", "snapkv"])
    @pytest.mark.parametrize(("solver", "p"), [("adam", 0.9), ("bisect", 0.9), ("bisect", 0.6)])
    def test_temperatures(self, solver, p, scorer):
        """Few enough events that all are samples."""
        model, texts = tiny.make_model("llama", dtype=torch.float64), make_texts(112, 80)
        found = calibrate(model, texts, scorer=scorer, p=p, solver=solver, **SIZES, **QUIET)
        recorded = [attention_of("llama", ids) for ids in texts]
        for layer in range(3):
            samples = fitting_samples([record[layer] for record in recorded], SCORES[scorer], HEADS, **SIZES)
            z, reference, mask = samples
            assert z.shape[1] == 112 // 16 + 80 // 16
            fit = fit_temperatures(z, reference, p, mask=mask, solver=solver)
            torch.testing.assert_close(found.temperatures[layer].double(), fit.temperatures, rtol=1e-4, atol=0)
            torch.testing.assert_close(found.residuals[layer].double(), fit.residuals, rtol=1e-3, atol=1e-6)
            ones, fitted = [1.0] * HEADS, found.temperatures[layer].tolist()
            assert found.kept[0, layer].tolist() == medians(reference.log(), reference, mask, p, ones)
            assert found.kept[1, layer].tolist() == medians(z, reference, mask, p, ones)
            assert found.kept[2, layer].tolist() == medians(z, reference, mask, p, fitted)
        if scorer == "attention":
            torch.testing.assert_close(found.temperatures, torch.ones(3, HEADS), rtol=1e-3, atol=0)
        else:
            assert (found.temperatures - 1).abs().min() > 0.01

    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    def test_a_batch_is_its_texts_one_by_one(self, name):
        model, texts = tiny.make_model(name, dtype=torch.float64), make_texts(80, 80, 80)
        one_by_one = calibrate(model, texts, scorer="snapkv", **SIZES, **QUIET)
        together = calibrate(model, [torch.stack(texts)], scorer="snapkv", **SIZES, **QUIET)
        for part in ("counts", "risk", "temperatures", "residuals", "kept"):
            torch.testing.assert_close(getattr(together, part), getattr(one_by_one, part), rtol=1e-4, atol=1e-6)
        alone = calibrate(model, texts[:1], scorer="snapkv", **SIZES, **QUIET)
        assert not torch.allclose(alone.risk, together.risk, rtol=1e-2)

    def test_low_precision(self):
        """Ranks of near-equal tokens may differ; the sums hardly do."""
        texts = make_texts(112)
        options = SIZES | QUIET | {"scorer": "attention"}
        exact = calibrate(tiny.make_model("llama", dtype=torch.float64), texts, **options)
        for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
            found = calibrate(tiny.make_model("llama", dtype=dtype), texts, **options)
            error = (found.risk - exact.risk).abs().amax(-1) / exact.risk[..., 0]
            assert error.max() < tolerance

    def test_provenance(self):
        model, texts = tiny.make_model("llama"), make_texts(100, 70)
        scorer = {"name": "snapkv", "kernel_size": 3}
        found = calibrate(model, texts, scorer=scorer, p=0.7, **SIZES, **QUIET).provenance
        expected = {
            "name": "",
            "geometry": Traits.of(model.config).geometry,
            "layers": [0, 1, 2],
            "scorer": {"name": "snapkv", "kernel_size": 3, "pooling": "max", "group_reduce": "mean"},
            **SIZES,
            "p": 0.7,
            "tokens": 96 + 64,
            "length": 96,
        }
        assert {key: found[key] for key in expected} == expected
        assert found["versions"]["torch"] == torch.__version__
        again = calibrate(model, texts, **SIZES, **QUIET).provenance
        other = calibrate(model, make_texts(100, 70, seed=2), **SIZES, **QUIET).provenance
        assert again["texts_hash"] == found["texts_hash"] != other["texts_hash"]

    def test_the_curves_go_on_beyond_their_length(self):
        """Every head still has something to lose there: the last counts were measured, by contexts as long."""
        curves = calibrate(tiny.make_model("llama"), make_texts(160), **SIZES, **QUIET).curves
        assert (curves.loss.diff()[..., -1] < 0).all()
        _, gains = curves.continued()
        assert (gains > 0).all()
        assert (gains[..., curves.counts.shape[0] - 1] > gains[..., 0] * 1e-4).all()
        assert Risk(200).allocation(curves, 320, 10).sum() == 200 * 6

    @pytest.mark.parametrize("events", [17, 31])
    def test_at_most_16_samples(self, events, monkeypatch):
        samples = []

        def fit(scores, *args, **kwargs):
            samples.append(scores.shape[1])
            return fit_temperatures(scores, *args, **kwargs)

        monkeypatch.setattr(hardkv.calibration.survey, "fit_temperatures", fit)
        calibrate(tiny.make_model("llama"), make_texts(16 * events), **SIZES, **QUIET)
        assert 8 <= max(samples) <= 16


class TestMeasure:
    """A function of a `Step` that says what is lost."""

    @staticmethod
    def recorded(name, texts, scorer, sizes=SIZES):
        """The steps of a calibration with the default measure, and the calibration."""
        steps = []

        def measure(step):
            steps.append(step)
            return squared_attention(step)

        model = tiny.make_model(name, dtype=torch.float64)
        return steps, calibrate(model, texts, scorer=scorer, measure=measure, **sizes, **QUIET)

    def test_squared_attention_is_the_default(self):
        texts = make_texts(112, 80)
        steps, found = self.recorded("llama", texts, "snapkv")
        default = calibrate(tiny.make_model("llama", dtype=torch.float64), texts, scorer="snapkv", **SIZES, **QUIET)
        assert torch.equal(found.risk, default.risk)
        assert torch.equal(found.temperatures, default.temperatures)
        assert len(steps) == 3 * (5 + 3)  # contexts 32, 48, ..., 96 of the long text and 32, 48, 64 of the short one

    @pytest.mark.parametrize(
        ("name", "layers", "scorer", "sizes", "lengths"),
        [
            ("llama", [0, 1, 2], "snapkv", SIZES, [112]),
            ("llama", [0, 1, 2], "attention", {"window": 5, "sinks": 0, "interval": 7}, [45, 70]),
            ("gemma3", [1, 3], "attention", SIZES, [96]),
        ],
    )
    @pytest.mark.parametrize("batch", [1, 2])
    def test_what_a_step_says(self, name, layers, scorer, sizes, lengths, batch):
        """All measured steps of every layer, in order; what each count holds is simulated by itself."""
        interval, window, sinks = (sizes[part] for part in ("interval", "window", "sinks"))
        texts = [torch.stack(make_texts(*[length] * batch, seed=length)) for length in lengths]
        steps, found = self.recorded(name, texts, scorer, sizes)
        counts, wanted = found.counts.tolist(), []
        for text in texts:
            length = text.shape[1] // interval * interval
            records = [attention_of(name, ids[:length]) for ids in text]
            kept = {
                layer: [
                    list(kept_by(record[layer], SCORES[scorer], HEADS, h, counts, interval, window, sinks))
                    for record in records
                    for h in range(HEADS)
                ]
                for layer in layers
            }
            for event, end in enumerate(range(interval, length, interval)):
                if 4 * end >= length:
                    wanted += [(end, layer, [row[event] for row in kept[layer]]) for layer in layers]
        assert len(steps) == len(wanted) > 3 * len(layers)
        for step, (end, layer, rows) in zip(steps, wanted, strict=True):
            candidates = max(0, end - window - sinks)
            assert step.layer_idx == layer
            assert step.positions.tolist() == list(range(end, end + interval))
            assert step.queries.shape == (batch, 4, interval, 8)
            assert step.observation.lengths.tolist() == [end + interval] * (batch * HEADS)
            assert step.sinks is None
            assert step.edges.tolist() == [min(count - window - sinks, candidates) for count in counts]
            assert step.order.shape == (batch * HEADS, candidates)
            assert step.order.dtype == torch.int64
            for order, (column, held) in zip(step.order.tolist(), rows, strict=True):
                assert column == end
                assert sorted(order) == list(range(sinks, end - window))
                for c, some in zip(step.edges.tolist(), held, strict=True):
                    assert set(order[:c]) == some
        assert any(order != sorted(order) for order in steps[-1].order.tolist())

    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    def test_queries_and_keys_are_those_of_the_model(self, name):
        """What the queries of a step pay to the columns so far, from the step alone, is the model's attention."""
        (ids,) = make_texts(80)
        steps, _ = self.recorded(name, [ids], "attention")
        record = attention_of(name, ids)
        for step in steps:
            start, stop = int(step.positions[0]), int(step.positions[-1]) + 1
            keys = step.observation.keys.view(HEADS, stop, -1).repeat_interleave(2, 0)
            logits = step.queries[0] @ keys.transpose(1, 2) * step.observation.scale
            later = torch.arange(stop) > step.positions[:, None]
            paid = logits.masked_fill(later, -torch.inf).softmax(-1)
            exact = torch.tensor(record[step.layer_idx][:, start:stop, :stop])
            torch.testing.assert_close(paid, exact, rtol=1e-8, atol=1e-10)

    def test_learned_sinks(self):
        model = gpt_oss()
        steps = []

        def measure(step):
            steps.append(step)
            return squared_attention(step)

        calibrate(model, make_texts(96), measure=measure, **SIZES, **QUIET)
        assert {step.layer_idx for step in steps} == {0, 1}
        for step in steps:
            assert torch.equal(step.sinks, model.model.layers[step.layer_idx].self_attn.sinks)

    @pytest.mark.parametrize(("name", "layers"), [("llama", [0, 1, 2]), ("gemma3", [1, 3])])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_another_measure_makes_the_curves(self, name, layers, dtype):
        """Tokens cost by their age, head and layer: every field of a step counts, and nothing of its attention."""

        def price(age, row, layer):
            return (1 + row % HEADS) * (1 + layer) / (10 + age)

        def by_age(step):
            age = step.positions.double().mean() - step.order
            row = torch.arange(step.order.shape[0])[:, None]
            cost = price(age, row, step.layer_idx)
            sums = [cost[:, a:b].sum(1) for a, b in pairwise(step.edges.tolist())]
            return torch.stack(sums, 1).to(dtype)

        def paid(weights, end, interval, heads):
            age = end + (interval - 1) / 2 - np.arange(end)
            return [price(age, h, layer) for h in range(heads)]

        model, texts = tiny.make_model(name, dtype=torch.float64), make_texts(112, 80, 80)
        batched = [texts[0], torch.stack(texts[1:])]
        found = calibrate(model, batched, scorer="snapkv", measure=by_age, **SIZES, **QUIET)
        recorded = [attention_of(name, ids) for ids in texts]
        for rank, layer in enumerate(layers):
            weights = [record[layer] for record in recorded]
            expected = measured_risk(weights, snapkv_scores, HEADS, found.counts.tolist(), **SIZES, paid=paid)
            assert expected[:, 0].min() > 0.1
            torch.testing.assert_close(found.risk[rank].double(), torch.tensor(expected), rtol=1e-5, atol=1e-7)
        default = calibrate(model, batched, scorer="snapkv", **SIZES, **QUIET)
        assert torch.equal(found.temperatures, default.temperatures)
        assert found.provenance == default.provenance

    def test_heads_without_losses(self):
        """Zeros make a curve of zeros, and the budget leaves these heads the floor."""

        def first_only(step):
            lost = squared_attention(step)
            lost[1:] = 0
            return lost

        found = calibrate(tiny.make_model("llama"), make_texts(112), measure=first_only, **SIZES, **QUIET)
        assert (found.risk[:, 0, 0] > 0).all()
        assert (found.risk[:, 1] == 0).all()
        assert Risk(30, floor=12).allocation(found.curves, 96, 10)[:, 1].tolist() == [12] * 3

    def test_an_error_of_a_measure(self):
        def broken(step):
            raise ArithmeticError("my measure")

        model = tiny.make_model("llama").train()
        with pytest.raises(ArithmeticError, match="my measure"):
            calibrate(model, make_texts(80), measure=broken, **SIZES, **QUIET)
        assert model.training


def caches():
    return [found for found in gc.get_objects() if issubclass(type(found), HardKVCache)]


class TestTheModelIsLeftAsItWas:
    @pytest.mark.parametrize("training", [True, False])
    def test_afterwards(self, training):
        model, (ids,) = tiny.make_model("llama"), make_texts(80)
        with torch.no_grad():
            before = model(input_ids=ids[None], use_cache=False).logits
        config = copy.deepcopy(model.config.to_dict())
        model.train(training)
        others = {id(found) for found in caches()}  # of other tests
        calibrate(model, [ids], **SIZES, **QUIET)
        assert all(module.training is training for module in model.modules())
        assert model.config.to_dict() == config
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids[None], use_cache=False).logits, before)
        held = [found for found in caches() if id(found) not in others]
        assert all(found.get_seq_length() == 0 for found in held)

    def test_twice_is_the_same(self):
        model, texts = tiny.make_model("llama"), make_texts(80)
        first, second = (calibrate(model, texts, **SIZES, **QUIET) for _ in range(2))
        assert torch.equal(first.risk, second.risk)
        assert torch.equal(first.temperatures, second.temperatures)

    def test_after_an_error(self):
        model = tiny.make_model("llama").train()
        with pytest.raises(IndexError):
            calibrate(model, [torch.full((80,), tiny.VOCABULARY)], **SIZES, **QUIET)
        assert model.training
        assert torch.is_grad_enabled()

    def test_modules_in_different_modes(self):
        """A frozen part in eval mode while the rest trains."""
        model = tiny.make_model("llama").train()
        model.model.layers[0].eval()
        calibrate(model, make_texts(80), **SIZES, **QUIET)
        assert [layer.training for layer in model.model.layers] == [False, True, True]

    def test_inside_inference_mode(self):
        model, texts = tiny.make_model("llama"), make_texts(80)
        with torch.inference_mode():
            inside = calibrate(model, texts, scorer="snapkv", **SIZES, **QUIET)
        outside = calibrate(model, texts, scorer="snapkv", **SIZES, **QUIET)
        torch.testing.assert_close(inside.temperatures, outside.temperatures)
        assert torch.equal(inside.risk, outside.risk)

    @pytest.mark.parametrize("progress", [True, False])
    def test_progress(self, progress, capfd):
        calibrate(tiny.make_model("llama"), make_texts(80), **SIZES, progress=progress)
        out, err = capfd.readouterr()
        assert out == ""
        assert ("calibrating" in err) == progress
        assert bool(err) == progress


class TestErrors:
    """Each names what was wrong and what to do."""

    @pytest.mark.parametrize(
        ("texts", "options", "error", "match"),
        [
            ("one text", {}, TypeError, r"\[text\]"),
            (torch.arange(90), {}, TypeError, r"\[text\]"),
            ([], {}, ValueError, "texts is empty"),
            ([torch.arange(90.0)], {}, ValueError, r"float32 \(90,\) must be integers"),
            ([torch.ones(1, 1, 90, dtype=torch.int64)], {}, ValueError, r"\(1, 1, 90\).*\[B, n\]"),
            (b"one text", {}, TypeError, "a list, not a bytes"),
            ({"a": "text"}, {}, TypeError, "a list, not a dict"),
            ([b"some text"], {}, TypeError, "text 0 is a bytes: pass a string"),
            ([*make_texts(90), list(range(90))], {}, TypeError, "text 1 is a list: pass a string, or token ids"),
            ([torch.ones(90, dtype=torch.bool)], {}, ValueError, r"bool \(90,\) must be integers"),
            (make_texts(90, 32), {}, ValueError, "text 1 gives 32 tokens.*too short.*48 at least.*interval 16"),
            (make_texts(90, 47), {}, ValueError, "47 tokens.*too short.*48 at least"),
            (make_texts(7), {}, ValueError, "text 0 gives 7 tokens.*too short"),  # of an interval's beginning
            ([torch.zeros(0, dtype=torch.long)], {}, ValueError, "text 0 gives 0 tokens"),
            (make_texts(90), {"window": 80, "sinks": 0}, ValueError, "90 tokens.*too short.*112 at least"),
            (make_texts(1040), {}, ValueError, "1040 tokens.*at most 1024.*length=1024"),
            (["some text"], {}, ValueError, "tokenizer="),
            (make_texts(90), {"p": 0.0}, ValueError, "p=0.0"),
            (make_texts(90), {"p": 1.5}, ValueError, "p=1.5"),
            (make_texts(90), {"length": 0}, ValueError, "length=0"),
            (make_texts(90), {"scorer": "snapvk"}, ValueError, "snapvk.*snapkv"),
            (make_texts(90), {"window": 0}, ValueError, "window=0"),
            (make_texts(90), {"sinks": -1}, ValueError, "sinks=-1"),
            (make_texts(90), {"interval": -16}, ValueError, "interval=-16"),
            (make_texts(90), {"interval": 0}, ValueError, "interval=0"),
            (make_texts(90), {"solver": "sgd"}, ValueError, "solver.*sgd.*adam"),
        ],
    )
    def test_arguments(self, texts, options, error, match):
        with pytest.raises(error, match=match):
            calibrate(tiny.make_model("llama"), texts, **(SIZES | QUIET | options))

    def test_a_bad_solver_costs_no_forward(self):
        model = tiny.make_model("llama")
        model.forward = None
        with pytest.raises(ValueError, match="solver"):
            calibrate(model, make_texts(90), solver="sgd", **SIZES, **QUIET)

    def test_just_long_enough(self):
        model = tiny.make_model("llama", max_position_embeddings=64)
        calibrate(model, make_texts(48), **SIZES, **QUIET)
        calibrate(model, make_texts(70), **SIZES, **QUIET)  # 64 of them
        with pytest.raises(ValueError, match="80 tokens.*at most 64"):
            calibrate(model, make_texts(80), **SIZES, **QUIET)

    @pytest.mark.filterwarnings("ignore:no layer of")
    def test_no_layer_with_full_attention(self):
        model = tiny.make_model("mistral", sliding_window=16)
        with pytest.raises(ValueError, match="no layer of MistralForCausalLM uses full attention"):
            calibrate(model, make_texts(90), **SIZES, **QUIET)


# ---------------------------------------------------------------- from a calibration to what a cache keeps


def kept_with(temperatures, weights, budget, scores, *, window, sinks, **_):
    """Columns that the heads of one layer keep after the prompt's event, `[H]` lists."""
    heads, end = len(temperatures), weights.shape[-1]
    z, mass = scores(weights, end, window, heads), received(weights, end, window, heads)
    inner = range(sinks, end - window)
    protected = sorted(set(range(end)) - set(inner))
    order = [sorted(inner, key=lambda t, h=h: (-z[h, t], -t)) for h in range(heads)]
    after = []  # of every head, the mass that goes when candidate j and all worse ones do
    for h in range(heads):
        share = np.exp((z[h, order[h]] - z[h, order[h][0]]) / temperatures[h])
        after.append((1 - mass[h, protected].sum()) * share[::-1].cumsum()[::-1] / share.sum())
    if isinstance(budget, TopP):
        counts = [sum(u > 1 - budget.p for u in row) for row in after]
    else:
        pool = sorted((-u, h) for h in range(heads) for u in after[h])[: heads * (budget.n - len(protected))]
        counts = [sum(h == owner for _, owner in pool) for h in range(heads)]
    return [sorted(protected + order[h][: counts[h]]) for h in range(heads)]


def handmade_temperatures(model, layers, scorer):
    temperatures = torch.tensor([0.25, 4.0, 2.0, 0.5, 1.5, 0.3])[: len(layers) * HEADS].view(len(layers), HEADS)
    provenance = {
        "name": "",
        "geometry": Traits.of(model.config).geometry,
        "layers": layers,
        "scorer": describe_scorer(get_scorer(scorer)),
        "window": SIZES["window"],
    }
    return Calibration(temperatures, torch.zeros(len(layers), HEADS), provenance=provenance)


class TestTemperaturesReachTheBudget:
    @pytest.mark.parametrize(
        ("name", "layers", "scorer"),
        [("llama", [0, 1, 2], "attention"), ("llama", [0, 1, 2], "snapkv"), ("gemma3", [1, 3], "attention")],
    )
    @pytest.mark.parametrize("budget", [TopP(0.8, cap=None), Adaptive(24)], ids=str)
    def test_kept_sets(self, budget, name, layers, scorer, tmp_path):
        """By the path of a saved file, for all sequences of a batch."""
        model, prompts = tiny.make_model(name, dtype=torch.float64), make_texts(60, 60)
        calibration = handmade_temperatures(model, layers, scorer)
        path = calibration.save(tmp_path / "by-hand.safetensors")
        recorded = [attention_of(name, ids) for ids in prompts]
        for more, temperatures in (
            ({}, torch.ones(len(layers), HEADS)),
            ({"calibration": str(path)}, calibration.temperatures),
        ):
            cache = HardKVCache(config=model.config, scorer=scorer, budget=budget, **more, **SIZES)
            with torch.no_grad():
                model(input_ids=torch.stack(prompts), **{CACHE: cache})
            assert cache.stats().temperatures == ([[row, row] for row in temperatures.tolist()] if more else [])
            for layer, row in zip(layers, temperatures.tolist(), strict=True):
                for b, record in enumerate(recorded):
                    wanted = kept_with(row, record[layer], budget, SCORES[scorer], **SIZES)
                    assert [kept.tolist() for kept in cache.kept(layer)[b]] == wanted
                    uncalibrated = kept_with([1.0] * HEADS, record[layer], budget, SCORES[scorer], **SIZES)
                    assert (wanted != uncalibrated) == bool(more)

    def test_from_calibrate_to_later_events(self):
        """The measured temperatures hold at every event; an integer budget with curves is Risk, which needs none."""
        model, texts = tiny.make_model("llama"), make_texts(96, 60)
        calibration = calibrate(model, texts[:1], scorer="snapkv", **SIZES, **QUIET)
        cache = HardKVCache(config=model.config, scorer="snapkv", budget=Adaptive(20), calibration=calibration, **SIZES)
        with torch.no_grad():
            for chunk in texts[1][None].split(12, 1):
                model(input_ids=chunk, **{CACHE: cache})
                assert cache.stats().temperatures == [[row] for row in calibration.temperatures.tolist()]
        cache = HardKVCache(config=model.config, scorer="snapkv", budget=20, calibration=calibration, **SIZES)
        assert cache.settings.budget == Risk(20)
        with torch.no_grad():
            model(input_ids=texts[1][None], **{CACHE: cache})
        assert cache.stats().temperatures == []
        wanted = Risk(20).allocation(calibration.curves, 60, 10)
        assert cache.lengths()[:, 0].tolist() == wanted.tolist()
        assert wanted.sum() == 20 * 6


# ---------------------------------------------------------------- texts, and once per model

WORDS = ["<pad>", "<unk>", *(f"w{i}" for i in range(2, tiny.VOCABULARY))]


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def as_text(ids):
    return " ".join(WORDS[i] for i in ids.tolist())


class TestTexts:
    def test_text_is_its_tokens(self):
        model, texts = tiny.make_model("llama"), make_texts(96, 80)
        by_ids = calibrate(model, texts, **SIZES, **QUIET)
        by_text = calibrate(model, [as_text(ids) for ids in texts], tokenizer=make_tokenizer(), **SIZES, **QUIET)
        assert torch.equal(by_text.risk, by_ids.risk)
        assert by_text.provenance == by_ids.provenance

    def test_length_cuts_texts_and_not_ids(self):
        model, (ids,) = tiny.make_model("llama"), make_texts(96)
        cut = calibrate(model, [as_text(ids)], tokenizer=make_tokenizer(), length=70, **SIZES, **QUIET)
        assert cut.provenance["tokens"] == 64
        assert torch.equal(cut.risk, calibrate(model, [ids[:64]], length=20, **SIZES, **QUIET).risk)

    def test_no_more_than_the_model_has_positions(self):
        model, texts = tiny.make_model("llama", max_position_embeddings=64), [as_text(*make_texts(96))]
        assert calibrate(model, texts, tokenizer=make_tokenizer(), **SIZES, **QUIET).provenance["length"] == 64
        with pytest.raises(ValueError, match="96 tokens.*at most 64.*length=64"):
            calibrate(model, texts, tokenizer=make_tokenizer(), length=96, **SIZES, **QUIET)

    def test_the_default_texts(self, monkeypatch):
        model, texts = tiny.make_model("llama"), make_texts(96, 80)
        monkeypatch.setattr(
            hardkv.calibration.calibrate, "default_texts", lambda: {"a": as_text(texts[0]), "b": "w3 " * 50}
        )
        found = calibrate(model, tokenizer=make_tokenizer(), **SIZES, **QUIET)
        assert found.provenance["tokens"] == 96 + 48

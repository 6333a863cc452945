"""The loss by fewer bits against plain loops in float64, and what a calibration makes of it."""

import math

import numpy as np
import pytest
import torch

from hardkv import calibrate
from hardkv.calibration.distortion import QUANTISED, QUERIES, distortion
from hardkv.calibration.survey import Step, squared_attention
from hardkv.selectors import Observation
from tests.cache import conftest as tiny
from tests.cache.plain_codes import quantised
from tests.models.tiny import tiny_model

BATCH, HEADS, GROUP, DIM, FIRST = 2, 2, 3, 8, 2  # FIRST: protected tokens before the candidates
SIZES = {"window": 8, "sinks": 2, "interval": 16, "progress": False}


def make_step(tokens, candidates, queries, softcap=None, sinks=None):
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(BATCH, HEADS, tokens, DIM, generator=generator).double() + 1 for _ in range(2))
    query = torch.randn(BATCH, HEADS * GROUP, queries, DIM, generator=generator).double()
    observation = Observation.from_dense(keys, values, query, scale=0.6, softcap=softcap)
    order = torch.stack([torch.randperm(candidates, generator=generator) for _ in range(BATCH * HEADS)]) + FIRST
    positions = torch.arange(tokens - queries, tokens)
    return Step(0, observation, query, positions, sinks, order, torch.tensor([0, candidates])), keys, values, query


def output(query, keys, values, at, softcap, sink):
    logits = 0.6 * keys[: at + 1] @ query
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    weights = np.exp(logits)
    return weights @ values[: at + 1] / (weights.sum() + (0 if sink is None else math.exp(sink)))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": torch.linspace(-1, 2, HEADS * GROUP).double()}])
@pytest.mark.parametrize(("tokens", "candidates", "queries"), [(30, 20, 6), (90, 40, 2 * QUERIES + 1)])
def test_squared_errors_of_the_output(tokens, candidates, queries, options):
    """Over the mean squared distance of a candidate's value from their mean; of at most QUERIES queries."""
    step, keys, values, query = make_step(tokens, candidates, queries, **options)
    found = distortion(step)
    assert found.shape == (BATCH * HEADS, 2, len(QUANTISED))
    assert found.dtype == torch.float64
    measured = range(0, queries, -(-queries // QUERIES))
    assert len(measured) <= QUERIES
    sinks = step.sinks if step.sinks is None else step.sinks.tolist()
    inner = slice(FIRST, FIRST + candidates)
    for row in (0, BATCH * HEADS - 1):
        b, h = divmod(row, HEADS)
        states = keys[b, h].numpy(), values[b, h].numpy()
        centres = [each[inner].mean(0) for each in states]
        spread = ((states[1][inner] - centres[1]) ** 2).sum(1).mean()
        for kind in range(2):
            for i, bits in enumerate(QUANTISED):
                coded = [each.copy() for each in states]
                coded[kind][inner] = [quantised(state, centres[kind], bits) for state in states[kind][inner]]
                errors = []
                for g in range(h * GROUP, (h + 1) * GROUP):
                    for q in measured:
                        at, sink = tokens - queries + q, None if sinks is None else sinks[g]
                        vector = query[b, g, q].numpy()
                        one, other = (
                            output(vector, *each, at, step.observation.softcap, sink) for each in (states, coded)
                        )
                        errors.append(((one - other) ** 2).sum())
                assert found[row, kind, i].item() == pytest.approx(np.mean(errors) / spread, rel=1e-6)


def make_texts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, tiny.VOCABULARY, (length,), generator=generator) for length in lengths]


class TestCalibrations:
    def test_what_is_measured(self):
        """Fewer bits lose more, in every head; the rest of the calibration is what it is without."""
        model = tiny.make_model("llama")
        found = calibrate(model, make_texts(112, 80), **SIZES)
        layers, heads = found.temperatures.shape
        assert found.distortion.shape == (layers, heads, 2, len(QUANTISED))
        assert found.distortion.dtype == torch.float32
        assert (found.distortion.diff() > 0).all()
        without = calibrate(model, make_texts(112, 80), measure=squared_attention, **SIZES)
        assert without.distortion is None
        assert torch.equal(without.risk, found.risk)

    def test_a_share_of_the_steps_is_measured_at_all_lengths(self, monkeypatch):
        lengths = []

        def spy(step):
            lengths.append(int(step.observation.lengths[0]))
            return distortion(step)

        monkeypatch.setattr("hardkv.calibration.calibrate.distortion", spy)
        found = calibrate(tiny.make_model("llama"), make_texts(*[112] * 14), **SIZES)
        layers = len(found.temperatures)
        steps = 14 * 5  # from a quarter of the length on
        assert len(lengths) == pytest.approx(layers * steps / 7, rel=0.3)  # 14 * 7 events for 16 samples
        assert set(lengths) == {48, 64, 80, 96, 112}

    def test_models_that_are_not_quantised(self):
        assert calibrate(tiny_model("deepseek_v3"), make_texts(80), **SIZES).distortion is None

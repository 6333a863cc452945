"""A batch of answers: each as if it were alone, and measured for what it is."""

import pytest
import torch
from transformers import DynamicCache

from eval.methods import METHODS, Configuration, new_cache
from eval.sampling import SeededSampling, answer_batch, held_bytes, pad_left, sampling_parameters, seed_of
from hardkv import calibrate
from tests.eval import tiny

OPTIONS = {"window": 4, "sinks": 2, "interval": 8}
LENGTHS = (30, 11, 52)


@pytest.fixture(scope="module")
def model():
    return tiny.model().double()


@pytest.fixture(scope="module")
def calibration(model):
    ids = torch.randint(3, 98, (1, 160), generator=torch.Generator().manual_seed(1))
    return calibrate(model, [ids], scorer="attention", progress=False, **OPTIONS)


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 98, (length,), generator=generator).tolist() for length in LENGTHS]


def settings(method, calibration):
    if method == "full":
        return None
    budget = "p0.8" if method.startswith("topp") else "16"
    configuration = Configuration(method, "attention", budget)
    return configuration.settings(configuration.tokens(None), OPTIONS, calibration)


def answers(model, texts, cache, seeds, steps=24, parameters=None):
    parameters = parameters or sampling_parameters(model, greedy=False)
    return answer_batch(model, tiny.tokenizer(), texts, cache, seeds=seeds, parameters=parameters, max_new_tokens=steps)


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_does_not_depend_on_its_batch(model, calibration, method):
    made = settings(method, calibration)
    seeds = [seed_of(0, str(row), 0) for row in range(3)]
    together = answers(model, prompts(), new_cache(model, made), seeds)
    for row in range(3):
        (alone,) = answers(model, [prompts()[row]], new_cache(model, made), [seeds[row]])
        assert together[row].tokens == alone.tokens
        assert together[row].truncated == alone.truncated
        assert together[row].tokens_per_head == alone.tokens_per_head
        assert together[row].prompt_tokens == LENGTHS[row]


def test_seeds_belong_to_a_problem_and_a_sample():
    seeds = [seed_of(0, "a", 0), seed_of(0, "a", 1), seed_of(0, "b", 0), seed_of(1, "a", 0)]
    assert len(set(seeds)) == 4
    assert seeds[0] == seed_of(0, "a", 0)


def test_other_seeds_draw_other_answers(model):
    texts = [prompts()[0]] * 2
    first, second = answers(model, texts, DynamicCache(config=model.config), [1, 2])
    again, _ = answers(model, texts, DynamicCache(config=model.config), [1, 3])
    assert first.tokens == again.tokens != second.tokens


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([[0.3, -1.2, 2.0, 0.0, 1.1, -5.0]])
    rows = 8000
    parameters = {"temperature": 0.7, "top_k": 5, "top_p": 0.97}
    draw = SeededSampling(range(rows), 3, 1, parameters, "cpu")
    ids = torch.zeros(rows, 3, dtype=torch.int64)
    drawn = draw(ids, scores.expand(rows, -1)).argmax(-1)
    kept = (scores / 0.7).softmax(-1)[0]
    order = kept.argsort(descending=True)
    allowed = order[: int((kept[order].cumsum(0) < 0.97).sum()) + 1]
    expected = torch.zeros(6).scatter(0, allowed, kept[allowed])
    expected = expected / expected.sum()
    found = drawn.bincount(minlength=6) / rows
    assert found[expected == 0].sum() == 0
    assert (found - expected).abs().max() < 4 * 0.5 / rows**0.5


def test_the_draw_uses_the_number_of_its_step():
    draw = SeededSampling([5, 6], 3, 4, {}, "cpu")
    scores = torch.zeros(2, 1000)
    for step in range(4):
        token = draw(torch.zeros(2, 3 + step, dtype=torch.int64), scores).argmax(-1)
        assert torch.equal(token, (draw.numbers[:, step] * 1000).long())


def test_greedy_answers_are_generates_own(model):
    texts = prompts()
    expected = model.generate(
        **pad_left(texts, 0, "cpu"), max_new_tokens=12, do_sample=False, temperature=None, top_k=None, top_p=None
    )
    found = answers(model, texts, DynamicCache(config=model.config), [0] * 3, 12, {"do_sample": False})
    for row, answer in enumerate(found):
        assert answer.tokens == expected[row, max(LENGTHS) : max(LENGTHS) + len(answer.tokens)].tolist()


def test_a_models_own_processors_still_apply(model, monkeypatch):
    """A token that the generation config forbids is never drawn."""
    (before,) = answers(model, prompts()[:1], DynamicCache(config=model.config), [1])
    monkeypatch.setattr(model.generation_config, "suppress_tokens", sorted(set(before.tokens)))
    (after,) = answers(model, prompts()[:1], DynamicCache(config=model.config), [1])
    assert not set(before.tokens) & set(after.tokens)


def test_an_answer_ends_with_its_end_token(model, monkeypatch):
    """A token that is known to come is made the end token."""
    texts = prompts()
    (free,) = answers(model, texts[:1], DynamicCache(config=model.config), [1], 20)
    end = free.tokens[7]
    first = free.tokens.index(end)
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    found = answers(model, texts, DynamicCache(config=model.config), [1, 2, 3], 20)
    assert found[0].tokens == free.tokens[: first + 1]
    assert not found[0].truncated
    for answer in found[1:]:
        assert answer.truncated == (end not in answer.tokens)
        assert len(answer.tokens) == (20 if answer.truncated else answer.tokens.index(end) + 1)


def test_bytes_and_tokens_are_those_of_the_cache(model):
    cache = DynamicCache(config=model.config)
    (answer,) = answers(model, [prompts()[0]], cache, [0], 33, {"do_sample": False})
    steps = len(answer.tokens)
    per_token = sum(2 * layer.keys.shape[1] * layer.keys.shape[3] * 8 for layer in cache.layers)
    assert held_bytes(cache) == per_token * (30 + steps - 1)
    lengths = [30 + step - 1 for step in range(1, steps + 1, 16)]
    assert answer.held_peak == per_token * max(lengths)
    assert answer.held_mean == pytest.approx(per_token * sum(lengths) / len(lengths))
    assert answer.tokens_per_head == [[pytest.approx(sum(lengths) / len(lengths), abs=0.05)]]
    assert answer.allocated_mean is None
    assert answer.tokens_per_second == pytest.approx(steps / answer.seconds)


def test_a_compressed_cache_is_measured_by_itself(model, calibration):
    cache = new_cache(model, settings("topk", calibration))
    found = answers(model, prompts(), cache, [0] * 3, 24, {"do_sample": False})
    assert cache.stats().events > 1
    for answer in found:
        assert answer.held_peak >= answer.held_mean > 0
        for layer in answer.tokens_per_head:
            assert all(11 < tokens <= 16 + OPTIONS["interval"] for tokens in layer)
    assert held_bytes(cache) == cache.nbytes()


@pytest.mark.parametrize(("name", "value"), [("typical_p", 0.5), ("num_beams", 2)])
def test_what_cannot_be_drawn_row_by_row_is_refused(model, monkeypatch, name, value):
    monkeypatch.setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="--greedy"):
        sampling_parameters(model, greedy=False)
    assert sampling_parameters(model, greedy=True) == {"do_sample": False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["full", "topk"])
def test_the_allocator_is_asked_on_gpus(model, calibration, method):
    on_gpu = tiny.model().cuda()
    cache = new_cache(on_gpu, settings(method, calibration))
    for answer in answers(on_gpu, prompts(), cache, [1, 2, 3]):
        assert answer.allocated_mean >= 0.9 * answer.held_mean
        assert answer.allocated_peak >= answer.allocated_mean

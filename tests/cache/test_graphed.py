"""Test decoding by static steps against generate()'s own loop with the same settings: same tokens, same cache.

On a CPU the steps run uncaptured; with HARDKV_TEST_DEVICE=cuda they are replays of a CUDA graph.
"""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hardkv
import hardkv.cache.layer as layer_module
import hardkv.decoding.generate as module
from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.cache.routing.handles import KVHandle, UnroutedKVError
from hardkv.cache.storage.pool import GROWTH, Pool
from hardkv.decoding.fixed_tokens import StaticTokens
from hardkv.decoding.generate import graphed
from hardkv.decoding.joined_linears import adjacent
from hardkv.decoding.sliding import LAST
from hardkv.selectors import AdaKV, Adaptive, Pyramid, Risk, TopK, TopP
from tests.cache.conftest import generate_logits, make_model, make_prompts

EVICT = {"budget": 12, "window": 4, "interval": 5, "sinks": 1}
NEW = 23
ON_GPU = torch.get_default_device().type == "cuda"


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


@pytest.fixture(autouse=True)
def running_ahead(request, monkeypatch):
    """Make the host draw and step, on a CPU too, before it reads whether all sequences have ended."""
    monkeypatch.setattr(module, "runs_ahead", lambda device: getattr(request, "param", True))


waiting_too = pytest.mark.parametrize("running_ahead", [False, True], ids=["waiting", "ahead"], indirect=True)


def risk(model, n):
    """Return a risk budget whose heads differ, and its calibration."""
    config = model.config
    counts = torch.tensor([0, 4, 8, 16, 32, 64])
    steep = torch.linspace(0.02, 0.6, config.num_hidden_layers * config.num_key_value_heads)
    loss = torch.exp(-steep.view(config.num_hidden_layers, -1, 1) * counts) * (1 - counts / 64)
    temperatures = torch.ones(loss.shape[:2])
    provenance = {
        **{"geometry": Traits.of(config).geometry, "layers": list(range(config.num_hidden_layers))},
        **{"scorer": HardKVConfig().to_dict()["scorer"], "window": EVICT["window"]},
    }
    return {"budget": Risk(n), "calibration": Calibration(temperatures, temperatures, counts, loss, None, provenance)}


def same(model, inputs, new=NEW, atol=2e-6, cache_settings=None, **kwargs):
    """Run both loops; return their caches, the static one second."""
    arguments = EVICT | (cache_settings or {})
    caches = HardKVCache(config=model.config, **arguments), HardKVCache(config=model.config, **arguments)
    torch.manual_seed(3)
    tokens, logits = generate_logits(model, caches[0], inputs, new, **kwargs)
    torch.manual_seed(3)
    ours, our_logits = generate_logits(model, caches[1], inputs, new, custom_generate=graphed, **kwargs)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, atol=atol, rtol=1e-5)
    alike(*caches)
    return caches


def alike(one, other):
    """Check for the same tokens in the same tiers, and the same numbers on the host."""
    assert one.get_seq_length() == other.get_seq_length()
    assert one.stats().events == other.stats().events
    for idx in range(len(one.layers)):
        for row, other_row in zip(one.kept(idx), other.kept(idx), strict=True):
            for positions, other_positions in zip(row, other_row, strict=True):
                assert torch.equal(positions, other_positions)
        tiers, theirs = one.layers[idx].tiers, other.layers[idx].tiers
        assert torch.equal(tiers.tokens, theirs.tokens)
        assert torch.equal(tiers.dense.fill, theirs.dense.fill)
        assert tiers.dense.bound == theirs.dense.bound
        for dense in (tiers.dense, theirs.dense):
            assert not dense.even or bool((dense.fill == dense.bound).all())
        assert one.layers[idx].prompt_length == other.layers[idx].prompt_length
        assert torch.equal(one.lengths("sparse"), other.lengths("sparse"))


@pytest.mark.parametrize(
    "cache_settings",
    [
        {"budget": TopK(12)},
        {"budget": AdaKV(12), "scorer": "snapkv"},
        {"budget": Adaptive(12), "scorer": "rkv", "patience": 1},
        {"budget": TopP(0.9, cap=20), "calibration": "online", "refit": 2},
        {"budget": Pyramid(12)},
        {"budget": 40},  # more than there is
        {"pin_prompt": True, "budget": 20},
        {"interval": 1},
        {"bits": 4},
        {"bits": (8, 3), "budget": AdaKV(12), "scorer": "snapkv", "patience": 1},
    ],
    ids=lambda each: ",".join(f"{key}={value}" for key, value in each.items()),
)
def test_greedy(model, cache_settings):
    cache = same(model, make_prompts(3), cache_settings=cache_settings)[1]
    stats = cache.stats()
    assert stats.decode == ("captured" if ON_GPU else "uncaptured")
    assert (stats.captures > 0) == ON_GPU
    assert "decode steps" in str(stats)


def test_risk(model):
    cache = same(model, make_prompts(2, length=30), new=40, cache_settings=risk(model, 12))[1]
    assert cache.lengths().amin() < cache.lengths().amax()


def test_bits_by_layer(model):
    settings = risk(model, 12) | {"bits": "auto"}
    layers = torch.logspace(-3, 1, model.config.num_hidden_layers)
    distortion = layers.view(-1, 1, 1, 1) * torch.tensor([0.01, 0.2, 1.0, 4.0])
    settings["calibration"].distortion = distortion.expand(-1, model.config.num_key_value_heads, 2, -1)
    cache = same(model, make_prompts(2, length=30), new=40, cache_settings=settings)[1]
    assert len(set(map(tuple, cache.stats().layer_bits))) > 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_models(name, attn):
    same(make_model(name, attn), make_prompts(2))


@waiting_too
def test_sampling(model):
    same(model, make_prompts(3), do_sample=True, temperature=1.3, top_p=0.9)


def test_processors_and_copies_of_a_prompt(model):
    arguments = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "num_return_sequences": 2, "do_sample": True}
    same(model, make_prompts(2), **arguments)


@waiting_too
@pytest.mark.parametrize("after", [1, 2, 5, 6])
def test_the_last_sequence_ends(model, after):
    """The last sequence may end at any step, also in the step of an event; an extra step leaves nothing behind."""
    inputs = make_prompts(1)
    tokens, _ = generate_logits(model, HardKVCache(config=model.config, **EVICT), inputs, NEW)
    eos = int(tokens[0, inputs["input_ids"].shape[1] + after])
    first = tokens[0, inputs["input_ids"].shape[1] :].tolist().index(eos)
    cache = same(model, inputs, eos_token_id=eos)[1]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + first


@waiting_too
def test_sequences_that_end_early_are_padded(model):
    inputs = make_prompts(3)
    tokens, _ = generate_logits(model, DynamicCache(config=model.config), inputs, NEW)
    same(model, inputs, eos_token_id=[int(row[inputs["input_ids"].shape[1] + 4]) for row in tokens[:2]])


class EndAt(StoppingCriteria):
    def __init__(self, columns):
        self.columns = columns

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.columns, device=input_ids.device)


@waiting_too
@pytest.mark.parametrize("more", [1, 3, 5, 10])
def test_stopping_criteria(model, more):
    inputs = make_prompts(2)
    criteria = StoppingCriteriaList([EndAt(inputs["input_ids"].shape[1] + more)])
    cache = same(model, inputs, stopping_criteria=criteria)[1]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + more - 1


class Tape:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, piece):
        self.pieces.append(piece.flatten().tolist())

    def end(self):
        self.ended = True


@waiting_too
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_streamer(model, ours, stop):
    inputs = make_prompts(1)
    tokens, _ = generate_logits(model, HardKVCache(config=model.config, **EVICT), inputs, NEW)
    options = {"eos_token_id": int(tokens[0, -4])} if stop else {}
    tapes = []
    for way in (model.generate, lambda **kw: hardkv.generate(model, **kw) if ours else model.generate(
        custom_generate=graphed, **kw)):  # fmt: skip
        tapes.append(Tape())
        cache = HardKVCache(config=model.config, **EVICT)
        way(**inputs, **options, **{CACHE: cache}, max_new_tokens=NEW, do_sample=False, streamer=tapes[-1])
    assert tapes[0].pieces == tapes[1].pieces
    assert tapes[0].ended
    assert tapes[1].ended


def test_scores_and_plain_tokens(model):
    inputs = make_prompts(2)
    options = {"max_new_tokens": 7, "do_sample": False, "repetition_penalty": 1.5}
    results = []
    for extra in ({}, {"custom_generate": graphed}):
        cache = HardKVCache(config=model.config, **EVICT)
        out = model.generate(
            **inputs, **options, **extra, **{CACHE: cache}, return_dict_in_generate=True, output_scores=True
        )
        assert out[CACHE] is cache
        assert out.logits is None
        results.append(torch.stack(out.scores))
        plain = model.generate(**inputs, **options, **extra, **{CACHE: HardKVCache(config=model.config, **EVICT)})
        assert torch.equal(plain, out.sequences)
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-5)


def test_in_one_call(model):
    inputs = make_prompts(2)
    tokens = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert torch.equal(hardkv.generate(model, **inputs, max_new_tokens=9, do_sample=False), tokens)
    with pytest.raises(ValueError, match="tokenizer"):
        hardkv.generate(model, **inputs, max_new_tokens=9, stop_strings="x")


@pytest.mark.parametrize("chunk", [None, 4])
def test_prefill_in_chunks_and_further_turns(model, chunk):
    """A second question uses the compressed context of the first, and the same pools."""
    inputs = make_prompts(2)
    caches = [HardKVCache(config=model.config, **EVICT) for _ in range(2)]
    tokens = [inputs["input_ids"], inputs["input_ids"]]
    addresses = None
    for turn in range(3):
        for i, extra in enumerate(({}, {"custom_generate": graphed})):
            mask = torch.nn.functional.pad(
                inputs["attention_mask"], (0, tokens[i].shape[1] - inputs["attention_mask"].shape[1]), value=1
            )
            tokens[i] = model.generate(
                tokens[i],
                attention_mask=mask,
                **{CACHE: caches[i]},
                max_new_tokens=11 + turn,
                do_sample=False,
                prefill_chunk_size=None if turn else chunk,  # transformers 5.17 loses the mask of later ones
                **extra,
            )
            tokens[i] = torch.cat([tokens[i], make_prompts(2, seed=turn)["input_ids"][:, -3:]], 1)
        assert torch.equal(*tokens)
        alike(*caches)
        decoding = caches[1].steps.decoding
        if turn:
            assert decoding.addresses == addresses
        addresses = decoding.addresses


def test_a_reset_cache_fills_its_pools_at_once(model):
    inputs, cache = make_prompts(2), HardKVCache(config=model.config, **EVICT)
    run = lambda **kw: generate_logits(model, cache, inputs, NEW, **kw)[0]  # noqa: E731
    first = run(custom_generate=graphed)
    decoding, held = cache.steps.decoding, cache.nbytes()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(custom_generate=graphed), first)
    assert cache.steps.decoding is decoding
    assert cache.nbytes() == held
    cache.reset()
    with decoding.placing():
        model(**inputs, **{CACHE: cache})
    for idx, pool in decoding.pools.items():
        tiers = cache.layers[idx].tiers
        assert tiers.condensed.keys.data_ptr() == pool.tokens[0].data_ptr()
        assert tiers.dense.keys.data_ptr() == pool.dense.keys.data_ptr()


def test_what_follows_without_static_steps(model):
    """Before and after static steps the cache works as usual: eager steps, crop, and other batches."""
    inputs = make_prompts(2)
    caches = same(model, inputs)
    more = make_prompts(2, seed=9)["input_ids"][:, -1:]
    mask = torch.ones(2, inputs["input_ids"].shape[1] + NEW, dtype=torch.long)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(7):
            logits = [model(more, attention_mask=mask, **{CACHE: cache}).logits for cache in caches]
            torch.testing.assert_close(*logits, atol=2e-6, rtol=1e-5)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for cache in caches:
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
    alike(*caches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = torch.randint(2, 40, (3, mask.shape[1] - 2 + 3))
        seen = torch.ones_like(ids)
        seen[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"][[1, 0, 1]]
        outs = [
            model.generate(ids, attention_mask=seen, **{CACHE: cache}, max_new_tokens=8, do_sample=False, **extra)
            for cache, extra in zip(caches, ({}, {"custom_generate": graphed}), strict=True)
        ]
    assert torch.equal(*outs)
    alike(*caches)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_begin_without_pools(model, copier):
    cache = same(model, make_prompts(2))[1]
    other = copier(cache)
    assert other.steps is None
    alike(cache, other)


def test_fixed_totals_never_move(model):
    """Pools have room for the whole answer from the start."""
    prompts = make_prompts(2, length=9)
    for cache_settings in ({"budget": AdaKV(20)}, {"budget": Adaptive(20)}, risk(model, 20)):
        cache = HardKVCache(config=model.config, **(EVICT | cache_settings))
        criteria = StoppingCriteriaList([Watch(lambda cache=cache: cache.steps and cache.steps.decoding)])
        generate_logits(model, cache, prompts, 70, custom_generate=graphed, stopping_criteria=criteria)
        assert len(criteria[0].seen) == 1
        assert cache.stats().captures == ON_GPU


@pytest.mark.parametrize("bits", [16, 4, (16, 3)], ids=str)
def test_rows_of_one_length_are_compacted_in_place(model, monkeypatch, bits):
    """Once all heads keep as many tokens as before, an event rewrites them in place and allocates nothing."""
    held, in_place, after = [], [], Pool.compact
    monkeypatch.setattr(Pool, "compact", lambda *args: in_place.append(after(*args)) or in_place[-1])
    for budget in (TopK(12), AdaKV(12)):
        settings = {"budget": budget, "scorer": "snapkv", "bits": bits}
        cache = same(model, make_prompts(2, length=30), cache_settings=settings)[1]
        held.append([tiers is not None for tiers in in_place])
        for idx, pool in cache.steps.decoding.pools.items():
            assert cache.layers[idx].tiers.condensed.keys.data_ptr() == pool.tokens[0].data_ptr()
        in_place.clear()
    events = len(held[0]) // model.config.num_hidden_layers
    assert events >= 4
    assert all(held[0])  # the prompt's own event has left 12 a head
    assert not all(held[1])


def test_empty_tiers_have_an_address(model, monkeypatch):
    """A graph captured before the first event reads what later events keep."""
    keys, totals = set(), set()
    attend = layer_module.attend_tiers

    def spy(query, held, values, rows, *tail, start, **options):
        if start == LAST:
            keys.add((held.data_ptr(), values.data_ptr()))
            totals.add(rows.total)
        return attend(query, held, values, rows, *tail, start=start, **options)

    monkeypatch.setattr(layer_module, "attend_tiers", spy)
    cache = same(model, make_prompts(2, length=3))[1]
    assert 0 in totals
    pools = cache.steps.decoding.pools.values()
    assert keys == {tuple(tensor.data_ptr() for tensor in pool.tokens[:2]) for pool in pools}
    assert cache.stats().captures == ON_GPU


def test_other_budgets_grow(model):
    cache = HardKVCache(config=model.config, **(EVICT | {"budget": TopP(0.97, cap=None)}))
    criteria = StoppingCriteriaList([Watch(lambda: cache.steps and cache.steps.decoding)])
    inputs = make_prompts(2)
    tokens, _ = generate_logits(model, cache, inputs, 60, custom_generate=graphed, stopping_criteria=criteria)
    assert len(criteria[0].seen) > 1
    for idx, pool in cache.steps.decoding.pools.items():
        assert pool.room <= GROWTH * max(criteria[0].totals[idx])
    plain = HardKVCache(config=model.config, **(EVICT | {"budget": TopP(0.97, cap=None)}))
    assert torch.equal(tokens, generate_logits(model, plain, inputs, 60)[0])
    if ON_GPU:
        assert cache.stats().captures > 1


class Watch(StoppingCriteria):
    """Record the addresses and contents of pools."""

    def __init__(self, find):
        self.find, self.seen, self.totals = find, set(), {}

    def __call__(self, input_ids, scores, **kwargs):
        decoding = self.find()
        if decoding:
            self.seen.add(decoding.addresses)
            for idx, layer in decoding.layers.items():
                self.totals.setdefault(idx, []).append(layer.tiers.condensed.rows.total)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Interrupt(LogitsProcessor):
    def __init__(self, at):
        self.left = at

    def __call__(self, input_ids, scores):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return scores


@waiting_too
@pytest.mark.parametrize("at", [2, 6, 7, 8])
def test_an_interrupt_leaves_whole_steps(model, at):
    inputs = make_prompts(2)
    cache = HardKVCache(config=model.config, **EVICT)
    with pytest.raises(KeyboardInterrupt):
        generate_logits(
            model, cache, inputs, NEW, custom_generate=graphed, logits_processor=LogitsProcessorList([Interrupt(at)])
        )
    other = HardKVCache(config=model.config, **EVICT)
    generate_logits(model, other, inputs, at)
    alike(cache, other)


@waiting_too
@pytest.mark.skipif(ON_GPU, reason="a replay comes whole or not at all")
@pytest.mark.parametrize("step", [1, 2, 6])
def test_a_step_that_fails_is_not_there(model, step):
    model, inputs = make_model("qwen3"), make_prompts(2)
    cache, calls = HardKVCache(config=model.config, **EVICT), []

    def fail(*args):
        calls.append(args)
        if len(calls) == step + 1:  # the first is the prefill
            raise MemoryError

    model.model.layers[-1].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        generate_logits(model, cache, inputs, NEW, custom_generate=graphed)
    other = HardKVCache(config=model.config, **EVICT)
    generate_logits(make_model("qwen3"), other, inputs, step)
    alike(cache, other)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 30), st.integers(6, 30), st.integers(1, 6), st.data())
def test_any_lengths(batch, length, new, budget, interval, data):
    model = make_model("llama", num_hidden_layers=1)
    scorer = data.draw(st.sampled_from(["attention", "snapkv", "rkv"]))
    kind = data.draw(st.sampled_from([TopK, AdaKV, Adaptive]))
    arguments = {"budget": kind(budget), "interval": interval, "scorer": scorer, "sinks": 0}
    same(model, make_prompts(batch, length=length), new=new, cache_settings=arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_beams": 2}, NotImplementedError, r"beam search \(num_beams=2\)"),
        ({"num_beams": 2, "do_sample": True}, NotImplementedError, r"beam sample \(num_beams=2\)"),
        ({"force_words_ids": [[5]], "num_beams": 2}, NotImplementedError, "constrained beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, r"contrastive search \(penalty_alpha=0.6\)"),
        ({"dola_layers": "low"}, NotImplementedError, r"dola generation \(dola_layers=low\)"),
        ({"prompt_lookup_num_tokens": 1}, NotImplementedError, r"assisted generation \(prompt_lookup_num_tokens=1\)"),
        ({"assistant_early_exit": 1}, NotImplementedError, r"assisted generation \(assistant_early_exit=1\)"),
        ({"assistant_model": "itself"}, NotImplementedError, r"assisted generation \(assistant_model\)"),
        ({"synced_gpus": True}, NotImplementedError, "synced_gpus"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, NotImplementedError, "output_hidden_states"),
        ({CACHE: None}, TypeError, f"{CACHE}=HardKVCache"),
        ({"settings": {"offload": True}}, NotImplementedError, "offload"),
    ],
)
def test_refusals(model, arguments, error, message):
    arguments = dict(arguments)
    cache = HardKVCache(config=model.config, **(EVICT | arguments.pop("settings", {})))
    arguments = {CACHE: cache} | arguments | ({"assistant_model": model} if "assistant_model" in arguments else {})
    with pytest.raises(error, match=message):
        model.generate(**make_prompts(2), max_new_tokens=4, custom_generate=graphed, **arguments)
    assert cache.get_seq_length() == 0


def test_ranks_that_go_on_together_are_refused(model, monkeypatch):
    """This happens where `generate()` itself decides it: with FSDP on several ranks."""
    monkeypatch.setattr("transformers.generation.utils.is_fsdp_managed_module", lambda _: True)
    monkeypatch.setattr("transformers.generation.utils._get_torch_distributed_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="synced_gpus"):
        hardkv.generate(model, **make_prompts(2), max_new_tokens=4)


@pytest.mark.parametrize(
    "positions_from",
    [lambda start, new: torch.arange(start, start + new), lambda start, new: torch.arange(new) + start],
    ids=["numbers", "tensors"],
)
def test_lengths_that_a_model_computes_with(model, monkeypatch, positions_from):
    """Positions from the cache's length would be captured as they were in the first step."""
    forward = model.model.forward

    def own_positions(*args, position_ids=None, input_ids, **kwargs):
        positions = positions_from(kwargs[CACHE].get_seq_length(), input_ids.shape[1])[None]
        return forward(*args, position_ids=positions, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", own_positions)
    with pytest.raises(NotImplementedError, match="length of its cache"):
        same(model, make_prompts(1))


def test_static_attention_outside_of_a_step():
    from hardkv.decoding.fixed_tokens import static_attention

    tensors = [torch.zeros(1, 1, 1, 4)] * 3
    with pytest.raises(RuntimeError, match="step"):
        static_attention(*tensors, 0, True, 1.0, None, None)


def test_handles_of_static_steps_are_opaque():
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(UnroutedKVError):
        KVHandle(StaticTokens(0, tensor, tensor), tensor) + 1


@pytest.mark.parametrize("shares", ["even", "risk"])
def test_nothing_is_made_on_the_default_device(model, shares):
    """The default device here is one whose tensors hold no numbers."""
    inputs, arguments = make_prompts(2), EVICT | (risk(model, 12) if shares == "risk" else {})
    with torch.device("meta"):
        cache = HardKVCache(config=model.config, **arguments)
        tokens, _ = generate_logits(model, cache, inputs, NEW, custom_generate=graphed)
    plain = HardKVCache(config=model.config, **arguments)
    assert torch.equal(tokens, generate_logits(model, plain, inputs, NEW)[0])


@pytest.mark.parametrize("bits", [16, 4])
def test_compiled(bits, tmp_path):
    model = make_model("qwen3", num_hidden_layers=2)
    inputs = make_prompts(2)
    caches = [HardKVCache(config=model.config, bits=bits, **EVICT) for _ in range(2)]
    tokens, logits = generate_logits(model, caches[0], inputs, 12)
    ours, our_logits = generate_logits(model, caches[1], inputs, 12, custom_generate=graphed, compile=True)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=1e-4)
    alike(*caches)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert adjacent([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert adjacent([mlp.gate_proj.weight, mlp.up_proj.weight])
    model.save_pretrained(tmp_path)  # as if nothing were next to anything
    again = AutoModelForCausalLM.from_pretrained(tmp_path).to(model.device)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters(), strict=True))
    assert copy.deepcopy(model)._hardkv_compiled is None  # it is the original's forward

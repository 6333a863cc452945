"""Test a quantised cache against a plain account of every token, in float64."""

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config

from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.cache.model import Traits
from hardkv.cache.storage.codec import Centres, Codec, token_nbytes
from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.tiers import Tiers
from hardkv.selectors import BUDGETS, SCORERS, AdaKV, Risk, TopK, get_budget
from tests.cache.bare_model import BareModel
from tests.cache.conftest import DEVICE
from tests.cache.plain_codes import CodedRow

LAYERS, HEADS, GROUP, DIM, SCALE = 2, 2, 2, 16, 0.3
MODEL = BareModel(LAYERS, HEADS, GROUP, DIM, SCALE)
CONFIG = MODEL.config


class Followed:
    """A cache, and a plain account of the states that it reads. Which tokens it keeps is its own choice."""

    def __init__(self, cache, batch, seed):
        self.cache, self.batch = cache, batch
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.bits = [layer.bits for layer in cache.layers]
        self.rows = [[[CodedRow(bits) for _ in range(HEADS)] for _ in range(batch)] for bits in self.bits]
        self.keys = np.zeros((LAYERS, batch, HEADS, 0, DIM))
        self.values = np.zeros((LAYERS, batch, HEADS, 0, DIM))
        self.exists = torch.zeros(batch, 0, dtype=torch.bool)
        self.dense = [[[] for _ in range(batch)] for _ in range(LAYERS)]  # positions in the dense tier
        self.events = 0

    def draw(self, heads, count):
        """Draw states on the CPU."""
        # a head's own mean, so that centring matters
        mean = torch.linspace(-2, 2, heads * DIM, dtype=torch.float64, device="cpu").view(1, 1, heads, 1, DIM)
        shape = (LAYERS, self.batch, heads, count, DIM)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") + mean

    def forward(self, exists):
        """Feed columns that exist, bool `[B, q]`, or not; compare what attention returns."""
        start, count = self.exists.shape[1], exists.shape[1]
        queries, keys, values = self.draw(HEADS * GROUP, count), self.draw(HEADS, count), self.draw(HEADS, count)
        kept = [self.cache.kept(layer) or [[[]] * HEADS] * self.batch for layer in range(LAYERS)]
        self.exists = torch.cat([self.exists, exists], 1)
        self.keys, self.values = (
            np.concatenate([old, new.numpy()], 3) for old, new in ((self.keys, keys), (self.values, values))
        )
        for layer in range(LAYERS):
            for b in range(self.batch):
                self.dense[layer][b] += (start + exists[b].nonzero()[:, 0]).tolist()
        states = (each.to(DEVICE) for each in (queries, keys, values))
        for layer, out in enumerate(MODEL.attend(self.cache, *states, self.exists)):
            self.compare(out.cpu().numpy(), queries[layer].numpy(), kept[layer], layer, start)
        self.after_events()

    def compare(self, out, query, kept, layer, start):
        for b in range(self.batch):
            for head in range(HEADS * GROUP):
                row = self.rows[layer][b][head // GROUP]
                keys, values = self.keys[layer, b, head // GROUP], self.values[layer, b, head // GROUP]
                old = [int(p) for p in kept[b][head // GROUP]]
                for i in range(query.shape[2]):
                    new = [p for p in range(start, start + i + 1) if self.exists[b, p]]
                    if not self.exists[b, start + i]:
                        continue
                    read = [row.read(p, keys, values) for p in old + new]
                    logits = np.array([query[b, head, i] @ key for key, _ in read]) * SCALE
                    weights = np.exp(logits - logits.max())
                    expected = (weights[:, None] * np.array([value for _, value in read])).sum(0) / weights.sum()
                    np.testing.assert_allclose(out[b, head, i], expected, atol=1e-9)

    def after_events(self):
        """Bring the account up to the events that the cache ran."""
        tiers = [layer.tiers for layer in self.cache.layers]
        if tiers[0].events == self.events:
            return
        self.events = tiers[0].events
        window = self.cache.settings.window
        for layer, held in enumerate(tiers):
            sinks = 0 if self.bits[layer] == (16, 16) else self.cache.settings.sinks
            for b in range(self.batch):
                for h in range(HEADS):
                    staying = [
                        int(p)
                        for tier in (held.condensed, held.sparse)
                        for p in tier.positions[tier.cu_seqlens[b * HEADS + h] : tier.cu_seqlens[b * HEADS + h + 1]]
                    ]
                    states = self.keys[layer, b, h], self.values[layer, b, h]
                    self.rows[layer][b][h].event(staying, self.dense[layer][b], *states, sinks)
            self.dense[layer] = [sorted({*tokens[:sinks], *tokens[-window:]}) for tokens in self.dense[layer]]
            for b in range(self.batch):  # so each token is in the dense tier or in a row, never in both
                assert held.dense.positions[b, : held.dense.fill[b]].tolist() == self.dense[layer][b]

    def check_observed(self):
        """Scorers see the states that attention reads."""
        for layer in range(LAYERS):
            observation = self.cache.observe(layer)
            for token, (position, row) in enumerate(zip(observation.positions.tolist(), observation.row, strict=True)):
                b, h = divmod(int(row), HEADS)
                states = self.keys[layer, b, h], self.values[layer, b, h]
                key, value = self.rows[layer][b][h].read(position, *states)
                np.testing.assert_allclose(observation.keys[token].cpu(), key, atol=1e-9)
                np.testing.assert_allclose(observation.values[token].cpu(), value, atol=1e-9)

    def copied(self):
        """Return an account and a cache that go on by themselves."""
        other = copy.copy(self)
        for name in ("cache", "rows", "dense"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other

    def select(self, rows):
        """Go on with some sequences of the batch."""
        self.cache.reorder_cache(torch.tensor(rows))
        self.batch, self.exists = len(rows), self.exists[rows]
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.dense = [[[*layer[b]] for b in rows] for layer in self.dense]
        self.rows = [[[row.copy() for row in layer[b]] for b in rows] for layer in self.rows]

    def crop(self, count):
        """Take back columns since the last event."""
        self.cache.crop(-count)
        left = self.exists.shape[1] - count
        self.exists = self.exists[:, :left]
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]
        self.dense = [[[p for p in tokens if p < left] for tokens in layer] for layer in self.dense]

    def store(self):
        """Go on with what torch.save wrote."""
        stored = io.BytesIO()
        torch.save(self.cache, stored)
        stored.seek(0)
        self.cache = torch.load(stored, weights_only=False)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(1, 7)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
        st.tuples(st.just("store"), st.just(0)),
        st.tuples(st.just("observe"), st.just(0)),
    ),
    min_size=2,
    max_size=9,
)


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([8, 4, 3, 2, (4, 2), (16, 3), (8, 16)]),
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(1, 6), st.integers(0, 2)),
    budget=st.sampled_from([TopK, AdaKV]),
    extra=st.integers(1, 8),
    prompt=st.integers(1, 20),
    pads=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    offload=st.booleans(),
    steps=steps,
    seed=st.integers(0, 1 << 16),
)
def test_any_run_reads_what_a_plain_account_reads(bits, sizes, budget, extra, prompt, pads, offload, steps, seed):
    window, sinks, interval, patience = sizes
    cache = HardKVCache(
        config=CONFIG, scorer="snapkv", budget=budget(window + sinks + extra), window=window, sinks=sinks,
        interval=interval, patience=patience, bits=bits, offload=offload,
    )  # fmt: skip
    follow(cache, prompt, pads, steps, seed)


def follow(cache, prompt, pads, steps, seed):
    """Run a prompt with `pads` columns before each sequence, and steps, and compare every output."""
    followed = Followed(cache, len(pads), seed)
    pads = torch.tensor(pads).clamp_max(prompt - 1)
    followed.forward(torch.arange(prompt) >= pads[:, None])
    for kind, argument in steps:
        if kind == "forward":
            followed.forward(torch.ones(followed.batch, argument, dtype=torch.bool))
        elif kind == "select":
            followed.select([row % followed.batch for row in argument])
        elif kind == "store":
            followed.store()
        else:
            followed.check_observed()


def calibrated(window, n, layers=((1, 1), (1, 1)), **changes):
    """Settings with bits "auto", and a calibration by which each layer's keys and values lose so much by few bits."""
    counts = torch.tensor([window, 10, 14, 20, 30, 50, 80])
    steep = torch.tensor([[0.02, 0.1], [0.05, 0.3]])
    risk = torch.exp(-steep[..., None] * counts) * (1 - counts / 80)
    by_bits = torch.tensor([0.01, 0.2, 1.0, 4.0])
    distortion = (torch.tensor(layers)[:, None, :, None] * by_bits).repeat(1, HEADS, 1, 1)
    provenance = {
        "geometry": Traits.of(CONFIG).geometry, "layers": [0, 1], "scorer": {"name": "attention"}, "window": window,
    }  # fmt: skip
    ones = torch.ones(LAYERS, HEADS)
    values = {"counts": counts, "risk": risk, "distortion": distortion, "provenance": provenance} | changes
    return {
        "budget": Risk(n), "bits": "auto", "calibration": Calibration(ones, ones, **values),
        "scorer": "attention", "window": window,
    }  # fmt: skip


@hypothesis_settings(max_examples=15, deadline=None, derandomize=True)
@given(
    scales=st.tuples(*[st.tuples(*[st.sampled_from([0.0, 0.01, 0.3, 3.0, 100.0])] * 2)] * 2),
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(1, 6), st.integers(0, 2)),
    extra=st.integers(1, 8),
    prompt=st.integers(1, 30),
    pads=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    offload=st.booleans(),
    steps=steps,
    seed=st.integers(0, 1 << 16),
)
def test_any_run_with_bits_by_layer(scales, sizes, extra, prompt, pads, offload, steps, seed):
    window, sinks, interval, patience = sizes
    settings = calibrated(window, window + sinks + extra, scales)
    cache = HardKVCache(
        config=CONFIG, sinks=sinks, interval=interval, patience=patience, offload=offload, **settings
    )  # fmt: skip
    follow(cache, prompt, pads, steps, seed)


def test_bits_by_layer():
    """Keys of the first layer and values of the second cannot be quantised well; bytes are those of the plan."""
    cache = HardKVCache(config=CONFIG, sinks=2, interval=6, **calibrated(4, 12, [(1.0, 0.01), (0.01, 1.0)]))
    (keys, values), (other_keys, other_values) = cache.stats().layer_bits
    assert keys > values
    assert other_keys < other_values
    followed = Followed(cache, 1, 0)
    for count in (90, 4, 6, 6):
        followed.forward(torch.ones(1, count, dtype=torch.bool))
    followed.crop(4)
    for each in (followed, followed.copied()):
        each.store()
        each.select([0, 0])
        each.forward(torch.ones(2, 9, dtype=torch.bool))
        each.check_observed()
        tiers = [layer.tiers.condensed for layer in each.cache.layers]
        nbytes = [token_nbytes(layer.bits, DIM, DIM, 2) for layer in each.cache.layers]
        spent = sum(tier.rows.total * each for tier, each in zip(tiers, nbytes, strict=True)) / 2
        total = LAYERS * HEADS * (12 - 4 - 2) * token_nbytes((16, 16), DIM, DIM, 2)
        assert total - max(nbytes) < spent <= total
    stats = followed.cache.stats()
    assert stats.bits == "auto"
    assert f"bits            auto: {keys}, {values} in 1 layers, {other_keys}, {other_values} in 1 layers" in str(stats)
    followed.cache.reset()
    assert [layer.bits for layer in followed.cache.layers] == [(keys, values), (other_keys, other_values)]


def test_a_layer_of_16_bits_beside_one_of_few():
    cache = HardKVCache(config=CONFIG, sinks=2, interval=6, **calibrated(4, 40, [(1e4, 1e4), (0.001, 0.001)]))
    assert cache.layers[0].codec is None
    assert max(cache.layers[1].bits) < 16
    followed = Followed(cache, 2, 0)
    for count in (90, 6, 6):
        followed.forward(torch.ones(2, count, dtype=torch.bool))
    followed.check_observed()


def test_auto_in_json(tmp_path):
    settings = calibrated(4, 12)
    settings["calibration"].save(tmp_path / "c.safetensors")
    config = HardKVConfig(**settings)
    again = HardKVConfig.from_json(config.to_json())
    assert again.bits == "auto"
    assert again.to_dict() == config.to_dict()
    one, other = (HardKVCache(config=CONFIG, **each.to_dict()).stats().layer_bits for each in (config, again))
    assert one == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None, "budget": 12}, r"budget=TopK\(n=12\), calibration=None: pass budget=Risk\(n\), and cal"),
        ({"budget": AdaKV(12)}, "pass budget=Risk"),
        ({"calibration": "online", "budget": 12}, "calibration='auto', or what hardkv.calibrate"),
        ({"calibration": calibrated(4, 12, distortion=None)["calibration"]}, "calibrate again, hardkv.calibrate"),
    ],
)
def test_what_auto_needs(changes, message):
    with pytest.raises(ValueError, match=message):
        HardKVConfig(**calibrated(4, 12) | changes)


def test_crops_take_back_what_was_not_quantised():
    cache = HardKVCache(config=CONFIG, budget=12, window=4, sinks=2, interval=6, bits=3)
    followed = Followed(cache, 2, 0)
    followed.forward(torch.ones(2, 20, dtype=torch.bool))
    for _ in range(3):
        followed.forward(torch.ones(2, 4, dtype=torch.bool))
        followed.crop(3)
        followed.forward(torch.ones(2, 5, dtype=torch.bool))
    assert followed.events > 2


def test_keys_stay_and_values_are_quantised_from_the_first_token_on():
    """No sinks, and the budget keeps everything, also through probation's tier."""
    cache = HardKVCache(config=CONFIG, budget=100, window=4, sinks=0, interval=6, bits=(16, 3), patience=1)
    followed = Followed(cache, 2, 0)
    followed.forward(torch.tensor([[True] * 20, [False] * 15 + [True] * 5]))
    for _ in range(3):
        followed.forward(torch.ones(followed.batch, 6, dtype=torch.bool))
        followed.select([1, 0, 0])
    followed.check_observed()
    assert cache.layers[0].tiers.condensed.columns.scales.dtype == torch.float16
    assert followed.events > 2


def measured(scorer, **tensors):
    """Return a calibration of the bare model whose heads differ."""
    counts = torch.tensor([0, 4, 8, 16, 32, 64])
    steep = torch.linspace(0.02, 0.6, LAYERS * HEADS).view(LAYERS, HEADS, 1)
    temperatures = torch.linspace(0.5, 1.5, LAYERS * HEADS).view(LAYERS, HEADS)
    provenance = {
        **{"geometry": Traits.of(CONFIG).geometry, "layers": list(range(LAYERS))},
        **{"scorer": HardKVConfig(scorer=scorer).to_dict()["scorer"], "window": 4},
    }
    loss = torch.exp(-steep * counts) * (1 - counts / 64)
    return Calibration(temperatures, temperatures, counts, loss, provenance=provenance, **tensors)


@pytest.mark.parametrize("name", sorted(BUDGETS))
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_every_scorer_and_budget(scorer, name):
    """With a sparse tier, and a row of pads and few tokens; budgets with temperatures fit them to decoded keys."""
    budget = get_budget({"name": name} | ({"p": 0.6, "cap": 12} if name == "topp" else {"n": 12}))
    calibration = measured(scorer) if budget.uses_risk else "online" if budget.uses_temperature else None
    cache = HardKVCache(
        config=CONFIG, scorer=scorer, budget=budget, calibration=calibration, window=4, sinks=2, interval=6,
        patience=1, bits=(4, 2),
    )  # fmt: skip
    followed = Followed(cache, 2, 0)
    followed.forward(torch.arange(16) >= torch.tensor([[0], [11]]))
    for _ in range(3):
        followed.forward(torch.ones(2, 6, dtype=torch.bool))
    followed.check_observed()
    assert followed.events == 4
    assert all(layer.tiers.condensed.keys.dtype == torch.uint8 for layer in cache.layers)


@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_centres(sinks):
    """Rows with codes keep theirs; others get the mean of their dense tier without sinks, in which slots are empty."""
    fills, lengths = [5, 2, 4], [(0, 0), (1, 0), (0, 0), (0, 0), (2, 2), (0, 1)]  # condensed, sparse
    keys, values = (torch.randn(3, HEADS, 5, dim) for dim in (4, 3))
    for states in (keys, values):
        states[1, :, 2:] = states[2, :, 4:] = torch.nan
    old = Centres(torch.randn(6, 4), torch.randn(6, 3))
    tiers = [SimpleNamespace(lengths=torch.tensor(each)) for each in zip(*lengths, strict=True)]
    dense = DenseTier(keys, values, torch.zeros(3, 5), torch.tensor(fills), 5, even=False)
    with torch.device("meta"):
        centres = Codec((4, 4), sinks, None).centres(old, *tiers, dense)
    for states, before, after in zip((keys, values), old, centres, strict=True):
        for row, (condensed, sparse) in enumerate(lengths):
            counted = states[row // HEADS, row % HEADS, sinks : fills[row // HEADS]]
            mean = counted.mean(0) if len(counted) else torch.zeros(states.shape[-1])
            torch.testing.assert_close(after[row], before[row] if condensed or sparse else mean)


def test_centres_of_half_precision_do_not_overflow():
    states = torch.full((1, 1, 300, 2), 300.0, dtype=torch.float16)
    tiers = Tiers.of(DenseTier.view(states, states), 300, Codec((4, 4), 0, None))
    assert tiers.next_centres().keys.tolist() == [[300.0, 300.0]]


def test_an_empty_tier_is_as_wide_as_its_codes():
    keys, values = torch.ones(1, HEADS, 5, 16, dtype=torch.bfloat16), torch.ones(1, HEADS, 5, 24, dtype=torch.bfloat16)
    columns = Codec((16, 3), 2, None).empty(HEADS, keys, values).columns
    assert [column.shape[1] for column in (columns.keys, columns.values, columns.scales)] == [16, 24 * 3 // 8, 2]
    assert (columns.keys.dtype, columns.values.dtype) == (torch.bfloat16, torch.uint8)


def test_calibrated_means_are_subtracted():
    """What is quantised lies at the calibrated centre, so it loses nothing; its own mean lies elsewhere."""
    means = torch.randn(LAYERS, HEADS, DIM), torch.randn(LAYERS, HEADS, DIM)
    provenance = {
        "geometry": Traits.of(CONFIG).geometry, "layers": [0, 1], "scorer": {"name": "attention"}, "window": 4,
    }  # fmt: skip
    plain = torch.ones(LAYERS, HEADS)
    calibration = Calibration(plain, plain, key_means=means[0], value_means=means[1], provenance=provenance)
    settings = {"budget": 12, "window": 4, "sinks": 2, "interval": 6, "bits": 2, "scorer": "attention"}
    cache = HardKVCache(config=CONFIG, calibration=calibration, **settings | {"budget": TopK(12)})
    keys, values = (mean[:, None, :, None].expand(-1, 2, -1, 20, -1) for mean in means)
    MODEL.attend(cache, torch.randn(LAYERS, 2, HEADS * GROUP, 20, DIM), keys, values, None)
    for layer in range(LAYERS):
        condensed = cache.layers[layer].tiers.condensed
        assert condensed.rows.total == 2 * HEADS * 6
        assert not condensed.columns.scales.any()
        observation = cache.observe(layer)
        assert torch.equal(observation.keys, means[0][layer][observation.row % HEADS])


def test_copies_go_on_by_themselves():
    cache = HardKVCache(config=CONFIG, budget=12, window=4, sinks=2, interval=6, bits=4)
    followed = Followed(cache, 1, 0)
    followed.forward(torch.ones(1, 20, dtype=torch.bool))
    for each in (followed, followed.copied()):
        for _ in range(3):
            each.forward(torch.ones(1, 6, dtype=torch.bool))


@pytest.mark.parametrize("bits", [1, 5, 4.0, True, "4", None, (4,), (4, 4, 4), (4, 7), "Auto"])
def test_bits_that_are_refused(bits):
    with pytest.raises(ValueError, match=r"must be one of \(16, 8, 4, 3, 2\), or a pair .*, or 'auto'"):
        HardKVConfig(bits=bits)


@pytest.mark.parametrize(("bits", "kept", "shown"), [((4, 4), 4, "4"), ([4, 2], (4, 2), "4, 2"), (16, 16, "16")])
def test_settings(bits, kept, shown):
    config = HardKVConfig(bits=bits)
    assert config.bits == kept
    assert HardKVConfig.from_json(config.to_json()) == config
    stats = HardKVCache(config=CONFIG, bits=bits).stats()
    assert stats.bits == shown
    assert (f"bits            {shown}" in str(stats)) == (kept != 16)


def test_head_dims_that_are_refused():
    cache = HardKVCache(config=CONFIG, bits=4)
    keys = torch.randn(1, HEADS, 3, 12)
    with pytest.raises(ValueError, match="bits=4 needs head dims that are multiples of 8, and those of layer 0 are 12"):
        cache.update(keys, keys, 0)
    assert not cache.get_seq_length()


def test_latents_are_refused():
    with pytest.raises(ValueError, match="has latent attention"):
        HardKVCache(config=DeepseekV3Config(), bits=4)


def test_masks_that_hide_sinks_are_refused():
    cache = HardKVCache(config=CONFIG, budget=12, window=4, sinks=2, interval=6, bits=4)
    followed = Followed(cache, 1, 0)
    followed.forward(torch.ones(1, 20, dtype=torch.bool))
    followed.exists[0, 1] = False
    with pytest.raises(NotImplementedError, match="hides one of the first 2 tokens"):
        followed.forward(torch.ones(1, 2, dtype=torch.bool))


def test_codes_take_the_bytes_that_they_say():
    """Per token and head: the codes, two scales, position and misses."""
    caches = {bits: HardKVCache(config=CONFIG, budget=60, window=8, sinks=4, bits=bits) for bits in (16, 8, 4, 3, 2)}
    states = [torch.randn(LAYERS, 1, heads, 90, DIM) for heads in (HEADS * GROUP, HEADS, HEADS)]
    for cache in caches.values():
        MODEL.attend(cache, *states, None)
    for bits, cache in caches.items():
        condensed = cache.layers[0].tiers.condensed
        tokens = HEADS * (60 - 8 - (4 if bits != 16 else 0))
        assert condensed.rows.total == tokens
        each = 2 * DIM * 4 if bits == 16 else 2 * DIM * bits // 8 + 4
        assert sum(column.nbytes for column in condensed.columns) == tokens * (each + 5)
        if bits != 16:
            assert cache.layers[0].codec.nbytes(DIM, DIM, 4) == each
    assert Codec((16, 2), 2, None).nbytes(16, 24, 8) == 16 * 8 + 24 * 2 // 8 + 4
    sizes = [cache.nbytes() for cache in caches.values()]
    assert sizes == sorted(sizes, reverse=True)

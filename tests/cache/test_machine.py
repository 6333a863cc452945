"""Test random sequences of all cache operations against a plain model of every token (`plain.py`).

After every step of the state machine the cache must hold exactly the positions, misses, keys and values that the plain
account says, and what attention returned must be dense attention masked by it.

CI runs 25 examples, the same ones every time. HARDKV_EXAMPLES=20000 runs so many new random ones instead, and says
how to reproduce a failure.
"""

import copy
import os
import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from hardkv import HardKVCache
from hardkv.selectors import AdaKV, TopK
from hardkv.selectors.budgets import Budget
from tests.cache.bare_model import BareModel
from tests.cache.conftest import DEVICE
from tests.cache.plain import DIM, GROUP, HEADS, LAYERS, SCALE, Columns, Observed, Plain, best_of_all, evenly

EXAMPLES = int(os.environ.get("HARDKV_EXAMPLES", "0"))
MOST_ROWS = 5


@dataclass(frozen=True)
class Worth:
    """Score a token by its summed dot products with the observed queries; record every call and fail on request."""

    calls: ClassVar[list[Observed]] = []
    fail_in: ClassVar[list[int]] = []  # how many calls succeed before one that runs out of memory

    def score(self, observation):
        if self.fail_in:
            self.fail_in[0] -= 1
            if self.fail_in[0] < 0:
                self.fail_in.clear()
                raise torch.OutOfMemoryError("out of memory")
        valid = observation.query_valid
        self.calls.append(Observed(observation.query_positions.tolist(), observation.queries.double(), valid))
        total = (observation.queries * valid[:, None, :, None]).sum(2)  # [B, Hq, D]
        total = total.unflatten(1, (observation.num_kv_heads, -1)).sum(2).flatten(0, 1)  # [R, D]
        return (observation.keys * total[observation.row]).sum(-1)


@dataclass(frozen=True)
class Uneven(Budget):
    """Each head keeps its own number of candidates, for rows of any length."""

    candidates: tuple[int, ...]

    def counts(self, ranking):
        return torch.tensor(self.candidates).repeat(ranking.observation.batch_size)

    def share(self, ranked, room):
        return list(self.candidates)


MODEL = BareModel(LAYERS, HEADS, GROUP, DIM, SCALE)
CONFIG = MODEL.config


def attend(cache: HardKVCache, new: Columns, exists: Tensor | None) -> list[Tensor]:
    """Use a cache like a model's forward pass: make a mask, then call `update` and attention per layer.

    Args:
        new: the new columns. exists: bool `[B, columns so far]`, the 2D attention mask.

    Returns:
        Per layer `[B, Hq, q, D]`.
    """
    return MODEL.attend(cache, new.queries.float(), new.keys.float(), new.values.float(), exists)


which = st.integers(0, 2)  # one of the caches
some_rows = st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=MOST_ROWS)


class CacheMachine(RuleBasedStateMachine):
    """Hold caches and their plain models; all but the first are copies that continued separately."""

    @initialize(
        window=st.integers(1, 5),
        sinks=st.integers(0, 3),
        interval=st.integers(1, 6),
        patience=st.integers(0, 2),
        pin_prompt=st.booleans(),
        extra=st.integers(1, 8),
        kind=st.sampled_from(["topk", "adakv", "uneven"]),
        uneven=st.tuples(st.integers(0, 6), st.integers(0, 6)),
        seed=st.integers(0, 1 << 16),
    )
    def build(self, window, sinks, interval, patience, pin_prompt, extra, kind, uneven, seed):
        n = window + sinks + extra + (10 if pin_prompt else 0)
        budget: Any = {"topk": TopK(n), "adakv": AdaKV(n, alpha=0.0), "uneven": Uneven(uneven)}[kind]
        share = {"topk": evenly, "adakv": best_of_all, "uneven": Uneven(uneven).share}[kind]
        sizes = {"window": window, "sinks": sinks, "interval": interval, "patience": patience, "pin_prompt": pin_prompt}
        cache = HardKVCache(config=CONFIG, scorer=Worth(), budget=budget, **sizes)
        self.pairs = [(cache, Plain(**sizes, share=share, n=n))]
        self.limit = None if kind == "uneven" else n
        self.generator = torch.Generator("cpu").manual_seed(seed)
        Worth.calls.clear()
        Worth.fail_in.clear()

    def pair(self, index: int) -> tuple[HardKVCache, Plain]:
        return self.pairs[index % len(self.pairs)]

    def random_columns(self, exists: Tensor) -> Columns:
        return Columns.random(exists, self.generator)

    def forward(self, cache: HardKVCache, plain: Plain, exists: Tensor, hidden: Tensor | None = None) -> None:
        """One forward pass over new columns that exist, bool `[B, q]`, or not; `hidden`: past ones that go."""
        new = self.random_columns(exists)
        past = exists[:, :0] if plain.columns is None else plain.columns.exists
        past = past if hidden is None else past & ~hidden
        mask = torch.cat([past, exists], 1)
        if self.refuses_prompt(plain, mask):
            if plain.due:  # the first layer would run its event before it refuses
                return
            with pytest.raises(ValueError, match="pin_prompt=True: the prompt has"):
                attend(cache, new, mask)
            return
        actual = attend(cache, new, None if mask.all() else mask)
        expected = plain.forward(new, Worth.calls, hidden=hidden)
        for ours, true in zip(actual, expected, strict=True):
            real = ~true.isnan()
            torch.testing.assert_close(ours.double()[real], true[real], atol=1e-4, rtol=0)

    def refuses_prompt(self, plain: Plain, mask: Tensor) -> bool:
        """Whether a pinned prompt exceeds the budget."""
        if not plain.pin_prompt or self.limit is None:
            return False
        prompting = plain.seen == 0 or (plain.prompt_length is None and mask.shape[1] - plain.seen > 1)
        return prompting and int(mask.sum(1).max()) + plain.window > self.limit

    def begun(self, index: int) -> tuple[HardKVCache, Plain]:
        """One of the caches, after a prompt: left-padded, with rows that have not begun yet."""
        cache, plain = self.pair(index)
        if not plain.seen:
            drawn = partial(torch.randint, generator=self.generator, device="cpu")
            columns, batch = (int(drawn(1, most + 1, ())) for most in (14, 3))
            pads = drawn(columns + 3, (batch, 1)) - 2
            pads[0] = pads[0].clamp_max(columns - 1)
            self.forward(cache, plain, torch.arange(columns) >= pads.to(DEVICE))
        return cache, plain

    # ------------------------------------------------------------------ forward passes

    @rule(which=which, times=st.integers(1, 6), finished=st.sets(st.integers(0, MOST_ROWS - 1), max_size=2))
    def decode(self, which, times, finished):
        """Feed single tokens; rows that have finished get pads."""
        cache, plain = self.begun(which)
        exists = torch.tensor([[row not in finished] for row in range(plain.batch)])
        for _ in range(times if plain.seen else 0):
            self.forward(cache, plain, exists)

    @rule(which=which, columns=st.integers(2, 7), holes=st.lists(st.integers(0, 7 * MOST_ROWS - 1), max_size=12))
    def chunk(self, which, columns, holes):
        """Feed several tokens at once, with pads anywhere; they belong to the prompt if only chunks came before."""
        cache, plain = self.begun(which)
        if plain.seen:
            exists = torch.ones(plain.batch, columns, dtype=torch.bool)
            for hole in holes:
                exists[hole // 7 % plain.batch, hole % 7 % columns] = False
            self.forward(cache, plain, exists)

    @rule(
        which=which,
        columns=st.integers(2, 6),
        pads=st.sets(st.integers(0, MOST_ROWS - 1), max_size=2),
        spans=st.lists(st.tuples(st.integers(0, MOST_ROWS - 1), st.integers(0, 20), st.integers(1, 9)), max_size=4),
    )
    def next_turn(self, which, columns, pads, spans):
        """A chunk whose mask hides past columns, a row's last ones or any, as those behind its end."""
        cache, plain = self.begun(which)
        if plain.seen:
            hidden = torch.zeros_like(plain.columns.exists)
            for row, back, width in spans:
                hidden[row % plain.batch, max(0, plain.seen - back - width) : max(0, plain.seen - back)] = True
            exists = torch.tensor([[row not in pads] * columns for row in range(plain.batch)])
            self.forward(cache, plain, exists, hidden)

    @rule(which=which, chunks=st.lists(st.integers(1, 6), max_size=5), rejected=st.integers(0, 12))
    def draft(self, which, chunks, rejected):
        """A round of assisted decoding: the model's (one chunk), the assistant's (several), or the prompt's."""
        self.record(which)
        cache, plain = self.begun(which)
        for columns in chunks if plain.seen else []:
            self.forward(cache, plain, torch.ones(plain.batch, columns, dtype=torch.bool))
        self.take_back(cache, plain, min(plain.seen, rejected))

    @rule(which=which, layer=st.integers(0, LAYERS - 1))
    def event_out_of_memory(self, which, layer):
        """Single tokens until an event, which fails: it must still come, before the next token."""
        cache, plain = self.begun(which)
        while plain.seen and not plain.recording:
            new = self.random_columns(torch.ones(plain.batch, 1, dtype=torch.bool))
            fails = plain.seen + 1 - plain.last_event >= plain.interval and not plain.due
            if not fails:
                self.forward(cache, plain, new.exists)
                continue
            Worth.fail_in.append(layer)
            with pytest.raises(torch.OutOfMemoryError):
                attend(cache, new, torch.cat([plain.columns.exists, new.exists], 1))
            Worth.calls.clear()
            plain.forward(new, Worth.calls, fails=True)
            return

    @rule(which=which, columns=st.integers(1, 14), layer=st.integers(0, LAYERS - 1))
    def prompt_out_of_memory(self, which, columns, layer):
        """Before the first layer has stored it nothing has happened; later on the cache refuses until it is reset."""
        cache, plain = self.pair(which)
        if plain.seen or plain.recording or self.refuses_prompt(plain, torch.ones(1, columns, dtype=torch.bool)):
            return
        new = self.random_columns(torch.ones(1, columns, dtype=torch.bool))
        Worth.fail_in.append(layer)
        with pytest.raises(torch.OutOfMemoryError):
            attend(cache, new, None)
        Worth.calls.clear()
        if layer:
            with pytest.raises(RuntimeError, match=r"stopped between layers.*reset\(\)"):
                attend(cache, new, None)
            cache.reset()

    # ------------------------------------------------------------------ everything else

    @rule(which=which, remove=st.integers(0, 9))
    def crop(self, which, remove):
        cache, plain = self.begun(which)
        self.take_back(cache, plain, remove)

    def take_back(self, cache: HardKVCache, plain: Plain, remove: int) -> None:
        if plain.refuses_crop(remove):
            with pytest.raises(ValueError, match="already compressed: crop less"):
                cache.crop(-remove)
        else:
            cache.crop(-remove)
            plain.crop(remove, Worth.calls)

    @rule(which=which)
    def record(self, which):
        """From the next forward on, which may be the prompt's."""
        cache, plain = self.pair(which)
        cache.activate_past_recording()
        plain.record()

    @rule(which=which, rows=some_rows)
    def reorder(self, which, rows):
        """Reorder rows as beam search does."""
        cache, plain = self.begun(which)
        rows = [rows[row % len(rows)] % plain.batch for row in range(plain.batch)]
        cache.reorder_cache(torch.tensor(rows, dtype=torch.long))
        plain.select(rows)

    @rule(which=which, repeats=st.integers(1, 3))
    def repeat(self, which, repeats):
        cache, plain = self.pair(which)
        if plain.batch * repeats <= MOST_ROWS:
            cache.batch_repeat_interleave(repeats)
            plain.select([row for row in range(plain.batch) for _ in range(repeats)])

    @rule(which=which, rows=some_rows, boolean=st.booleans())
    def select(self, which, rows, boolean):
        cache, plain = self.pair(which)
        rows = [row % max(plain.batch, 1) for row in rows]
        indices = torch.tensor(rows)
        if boolean and plain.batch:
            rows = sorted(set(rows))
            indices = torch.isin(torch.arange(plain.batch), indices)
        cache.batch_select_indices(indices)
        plain.select(rows)

    @rule(which=which, by_crop=st.booleans())
    def empty(self, which, by_crop):
        """A crop of everything goes on recording; a reset does not."""
        cache, plain = self.pair(which)
        if by_crop:
            cache.crop(-plain.seen)
        else:
            cache.reset()
        plain.clear()
        plain.recording &= by_crop

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(which=which)
    def fork(self, which):
        """Copy a cache; copy and original both continue."""
        self.pairs.append(copy.deepcopy(self.pair(which)))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=which)
    def forget(self, which):
        """Drop a copy; this does not affect the others."""
        self.pairs.pop(which % len(self.pairs))

    @rule(which=which)
    def save_and_load(self, which):
        cache, plain = self.pair(which)
        self.pairs[which % len(self.pairs)] = pickle.loads(pickle.dumps(cache)), plain

    @rule(which=which)
    def refusals(self, which):
        """Make bad calls; the invariants check that these change nothing."""
        cache, plain = self.pair(which)
        with pytest.raises(ValueError, match="minus the number of tokens"):
            cache.crop(1)
        if plain.seen and not plain.due:
            wide = torch.ones(plain.batch + 1, 1, dtype=torch.bool)
            with pytest.raises(ValueError, match="another batch or model"):
                attend(cache, self.random_columns(wide), None)
            with pytest.raises(ValueError, match="attention_mask covers"):
                attend(cache, self.random_columns(wide[1:]), wide[1:])
            exists = plain.columns.exists
            two = exists.new_ones(plain.batch, 2)
            shows = torch.cat([torch.ones_like(exists), two], 1)
            if not exists.all() and not self.refuses_prompt(plain, shows):
                with pytest.raises(NotImplementedError, match="which was padding or hidden before"):
                    attend(cache, self.random_columns(two), shows)

    # ------------------------------------------------------------------ after every step

    @invariant()
    def every_token_is_where_it_belongs(self):
        assert not Worth.calls  # every event was expected
        for cache, plain in getattr(self, "pairs", ()):
            check(cache, plain)


def check(cache: HardKVCache, plain: Plain) -> None:
    """Check that the cache equals the plain model: positions, misses, keys, values, lengths, and nothing else."""
    assert cache.get_seq_length() == plain.seen
    assert cache.stats().events == plain.events
    if not plain.seen:
        assert cache.nbytes() == 0
        return
    for idx, layer in enumerate(cache.layers):
        assert torch.equal(layer.tiers.tokens, plain.columns.exists.sum(1))
        kept = cache.kept(idx)
        dense, rows = layer.tiers.dense, {"condensed": {}, "sparse": {}}
        for name, of in rows.items():
            tier = getattr(layer.tiers, name)
            sizes = tier.cu_seqlens.diff().tolist()
            for what in ("positions", "misses", "keys", "values"):
                of[what] = getattr(tier, what).split(sizes)
        assert len(kept) == plain.batch
        for b in range(plain.batch):
            fill = int(dense.fill[b])
            recent = dense.positions[b, :fill].tolist()
            for head in range(HEADS):
                row = b * HEADS + head
                read, waiting = plain.kept(b, idx, head), plain.waiting(b, idx, head)
                assert kept[b][head].tolist() == read
                assert rows["condensed"]["positions"][row].tolist() + recent == read
                assert rows["sparse"]["positions"][row].tolist() == list(waiting)
                assert rows["sparse"]["misses"][row].tolist() == list(waiting.values())
                stored = [*read, *waiting]
                for what, true in (("keys", plain.columns.keys), ("values", plain.columns.values)):
                    parts = (
                        rows["condensed"][what][row],
                        getattr(dense, what)[b, head, :fill],
                        rows["sparse"][what][row],
                    )
                    assert torch.equal(torch.cat(parts).double(), true[idx, b, head, stored])
                assert [int(cache.lengths(tier)[idx, b, head]) for tier in (None, "sparse", "dense")] == [
                    len(read),
                    len(waiting),
                    fill,
                ]


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=EXAMPLES or 25,
    stateful_step_count=25,
    derandomize=not EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

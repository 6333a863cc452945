"""The events of one layer: when one is due, what its inputs are, and what the layer does with the result."""

from hardkv.cache.events.inputs import EventInputs
from hardkv.cache.events.select import observe
from hardkv.cache.schedule import run_events
from hardkv.cache.state import EventListener, LayerState
from hardkv.cache.storage.pool import Pool
from hardkv.cache.storage.queries import QueryRing
from hardkv.cache.storage.tiers import Tiers
from hardkv.selectors.observation import Observation


class LayerEvents(LayerState):
    """The events of a layer, and its tokens at fixed addresses between events."""

    @property
    def event_due(self) -> bool:
        """Whether the tokens since the last event reach the interval; also once after the first forward."""
        if self.tiers is None:
            return False
        last = self.tiers.compressed_at
        return last is None or self.tiers.seen - last >= self.settings.interval

    @property
    def _event_held(self) -> bool:
        return self.record_past or self.shared

    @property
    def ready(self) -> bool:
        """Whether an event is due and nothing holds it back."""
        return self.event_due and not self._event_held

    def pinned(self, seen: int) -> int:
        """Return how many columns of the prompt every event keeps: `seen` while the prompt has not ended."""
        if not self.settings.pin_prompt:
            return 0
        return seen if self.prompt_length is None else self.prompt_length

    def most_condensed(self, heads: int, length: int, pinned: int) -> tuple[int, bool]:
        """Return the most tokens that events keep per sequence outside its window, and whether that total is fixed.

        Args:
            heads: KV heads. length: columns that the sequence will have at most. pinned: columns of the prompt to keep.
        """
        window = self.settings.window
        protected = window + self.settings.sinks + pinned
        total = self.budget.fixed_total(heads, length, protected)
        fixed = total is not None
        if total is None:
            limit = length if self.budget.limit is None else max(self.budget.limit, protected)
            total = heads * min(limit, length)
        return max(total - heads * self.stay_in_dense, 0), fixed

    def compress(self) -> None:
        """Run an event now: score every token, apply the budget, free the tokens that lost."""
        with self._on_device():
            run_events([self])

    def observe(self) -> Observation:
        """Return what an event would show the scorer now."""
        with self._on_device():
            return observe(self.event_inputs())

    def event_inputs(self) -> EventInputs:
        """Return the inputs of an event that runs now."""
        assert self.tiers is not None
        assert self.ring is not None
        return self._inputs(self.tiers, self.ring, self.scale, self.softcap)

    def _inputs(self, tiers: Tiers, ring: QueryRing, scale: float, softcap: float | None) -> EventInputs:
        latent, pinned = self.head_dim if self.latent else None, self.pinned(tiers.seen)
        held = tiers, ring, pinned, scale, softcap
        return EventInputs(self.settings, self.budget, *held, self.temperatures, latent, self.pool)

    def install(self, tiers: Tiers) -> None:
        """Store the tiers that an event returned."""
        self.tiers, self.committed = tiers, tiers.seen
        if self.listener is not None:
            self.listener.event(self)

    def listen(self, listener: EventListener | None) -> None:
        """Call `listener.event` after every event from now on; None: stop."""
        self.listener = listener

    # ------------------------------------------------------------------ tokens from elsewhere

    def restore(self, tiers: Tiers, ring: QueryRing, scale: float) -> None:
        """Replace the tokens, all of a prompt, and the queries that score them; shapes as in the first forward."""
        self.tiers, self.ring, self.scale, self.prompt_length = tiers, ring, scale, tiers.seen

    def hold_in(self, pool: Pool) -> None:
        """Move tiers and queries to a pool's addresses."""
        assert self.tiers is not None
        assert self.ring is not None
        self.tiers, self.ring = pool.hold(self.tiers), pool.hold_ring(self.ring)

    def place_events(self, pool: Pool | None) -> None:
        """Let later events put their tiers into a pool; None: into new memory."""
        self.pool = pool

    def advance(self, count: int) -> None:
        """Count tokens of every sequence that steps stored in the pool without the host."""
        assert self.tiers is not None
        assert self.ring is not None
        prompt_length = self.tiers.seen if self.prompt_length is None else self.prompt_length
        tiers = self.tiers.advanced(count)
        self.ring.appended(count, tiers.seen)
        self.tiers, self.prompt_length = tiers, prompt_length

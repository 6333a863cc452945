"""One layer of the cache: store new tokens, attend over the tiers, and compress at events."""

import weakref
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.events.run import Events
from hardkv.cache.incoming import check_alike, check_numbers, what_else
from hardkv.cache.layer_events import LayerEvents
from hardkv.cache.protocol import LayerProtocol
from hardkv.cache.routing.handles import KVHandle, LatentHandle, UnroutedKVError
from hardkv.cache.routing.tokens import NewTokens
from hardkv.cache.routing.under_way import prefilling
from hardkv.cache.schedule import EventSchedule, run_events
from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.hidden import Past, noted, seen_through
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.cache.storage.queries import QueryRing
from hardkv.cache.storage.ragged import Columns
from hardkv.cache.storage.tiers import Tiers
from hardkv.cache.tensor_parallel import local_heads
from hardkv.kernels.attention import attend_tiers
from hardkv.kernels.autocast import active


class HardKVLayer(LayerEvents, LayerProtocol):
    """The Cascade Cache of one attention layer.

    A forward pass calls `update()`, which only wraps the new keys and values. Then it calls attention, which calls
    `prefill()` (first forward) or `decode()`. These store the tokens, attend, and run a due event.

    For its arguments, and for attributes that the cache may set, see `LayerState`.
    """

    # ------------------------------------------------------------------ called by the model

    @torch.compiler.disable
    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        schedule: EventSchedule | None = None,
        **kwargs: Any,
    ) -> tuple[KVHandle, KVHandle]:
        """Wrap new keys and values for attention, which stores them. This method stores nothing.

        Args:
            key_states: `[B, H, q, D]`. value_states: `[B, H, q, Dv]`.
            schedule: decides when this layer's events run; None: the layer runs them itself, at once.

        Raises:
            ValueError: the values do not fit the keys, or both do not fit what the cache holds.
        """
        if key_states.shape[:-1] != value_states.shape[:-1] or key_states.dtype != value_states.dtype:
            check_alike(key_states, value_states, self.layer_idx)
        if not self.is_initialized:
            check_numbers(key_states, self.layer_idx)
            self.lazy_initialization(key_states, value_states)
        got = (key_states.shape[0], key_states.shape[1], key_states.shape[3], value_states.shape[3])
        held = (self.batch_size, self.num_kv_heads, self.head_dim, self.value_dim)
        if got != held or (key_states.dtype != self.dtype and not active(key_states.device)):
            if self.seen == 0:
                self.lazy_initialization(key_states, value_states)
            else:
                raise ValueError(
                    f"layer {self.layer_idx} holds batch, KV heads, head_dim, value dim = {held} in {self.dtype} and "
                    f"gets {got} in {key_states.dtype}: {what_else(held, got)}"
                )
        if self.event_due:  # held back for assisted decoding, or because later layers still had to read the keys
            self.compress()
        new = NewTokens(self, key_states, value_states, self.seen, schedule)
        handle = LatentHandle if self.latent else KVHandle
        return handle(new, key_states), handle(new, value_states)

    def check_module(self, module: torch.nn.Module) -> None:
        """Raise ValueError if the query comes from another model's layer than before, or the heads are unknown."""
        owner = self._module() if self._module is not None else None
        if owner is None:
            self._take_heads(module)
            self._module = weakref.ref(module)
        elif owner is not module and not self.shared:
            raise ValueError(
                f"layer {self.layer_idx} of this HardKVCache was filled by another model; use a new HardKVCache for "
                "each model, or reset() this one"
            )

    def _take_heads(self, module: torch.nn.Module) -> None:
        """Take this process's heads from a calibration of all heads of the layer (tensor parallelism)."""
        whole = self.temperatures if self.means is None else self.means[0]
        total = self.budget.known_heads if whole is None else whole.shape[0]
        if total is not None and total != self.num_kv_heads:
            first, last = local_heads(module, total, self.num_kv_heads)
            self.budget = self.budget.for_heads(first, last)
            self.temperatures = None if self.temperatures is None else self.temperatures[first:last]
            self.means = None if self.means is None else (self.means[0][first:last], self.means[1][first:last])

    def prefill(
        self, new: NewTokens, query: Tensor, padding: Tensor | None, *, scale: float, softcap: float | None
    ) -> None:
        """Store the first tokens, to which the model's own kernel has already attended, and compress them soon.

        The event reads the raw keys and values, so the prompt is never stored uncompressed.
        """
        if not self._needs_storing(new):
            return
        self._check_pinned(new, padding)
        valid = _columns(padding, new)
        schedule, nbytes = new.schedule, storage_nbytes([new.keys, new.values])
        waits = schedule is not None and schedule.may_wait(self, nbytes)
        if valid is None and not self._event_held:
            dense = DenseTier.view(new.keys, new.values)
        else:  # pads must go, and tensors that outlive this call must not be views of the model's activations
            dense = DenseTier.allocate(new.keys, new.values, new.keys.shape[2])
            dense = dense.append(new.keys, new.values, valid, 0)
        ring = self._observe(query, valid, None, new)
        tiers = Tiers.of(dense, new.stop, self.codec)
        if self.first:
            tiers = noted(tiers, valid)
        if not self._event_held and not waits:
            ((_, tiers),) = Events([self._inputs(tiers, ring, scale, softcap)]).finish()
        if self.offloading is not None:
            tiers = self.offloading.leave(self.layer_idx, tiers)
        self._store(new, tiers, ring, scale, softcap)
        if self.listener is not None and tiers.compressed_at is not None:
            self.listener.event(self)
        if schedule is not None:
            schedule.prefilled(self, nbytes)

    def decode(
        self,
        new: NewTokens,
        query: Tensor,
        padding: Tensor | None,
        new_mask: Tensor | None,
        past: Past | None,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store later tokens, attend over all tiers, and compress if an event is due.

        Args:
            new: the tokens that `update()` wrapped. query: `[B, Hq, q, D]`.
            padding: bool `[B, columns so far]` or None. new_mask: bool `[B or 1, q, q]` or None (causal).
            past: what the mask says about earlier columns. None: nothing changed; after a step of one token, the next
                event checks that.
            scale, softcap, sinks: as in `kernels.attention.attend_tiers`.

        Returns:
            `[B, Hq, q, Dv]`.

        Raises:
            NotImplementedError: see `Past.applied`. Nothing has changed then.
        """
        with self._on_device():
            if self._needs_storing(new):
                if self._in_prompt(new):  # a prompt may come in chunks
                    self._check_pinned(new, padding)
                valid = _columns(padding, new)
                tiers, ring = self.tiers, self.ring
                assert tiers is not None
                assert ring is not None
                if past is not None:
                    tiers, ring = past.applied(tiers, ring, self.first)
                tiers = tiers.append(new.keys, new.values, valid)
                if self.first and past is None and padding is not None:  # the host should not wait in every step
                    tiers = seen_through(tiers, padding)
                elif self.first:
                    tiers = noted(tiers, valid)
                self._store(new, tiers, self._observe(query.detach(), valid, ring, new), scale, softcap)
            assert self.tiers is not None
            bound = self.tiers.dense.bound
            out = self.attend(query, bound, new.start, scale=scale, softcap=softcap, sinks=sinks, new_mask=new_mask)
            if new.schedule is not None:
                new.schedule.decoded(self)
            elif self.ready:
                run_events([self])
            return out

    def attend(
        self,
        query: Tensor,
        bound: int,
        start: int,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        new_mask: Tensor | None = None,
        room: Columns | None = None,
    ) -> Tensor:
        """Attend over all tiers, which already hold the new tokens.

        Args:
            query: `[B, Hq, q, D]`.
            bound, start, scale, softcap, sinks, new_mask: as in `kernels.attention.attend_tiers`.
            room: the memory that holds the condensed tier, if it is larger than the tier, which lies at its start.

        Returns:
            `[B, Hq, q, Dv]`.
        """
        assert self.tiers is not None
        condensed, dense = self.tiers.condensed, self.tiers.dense
        columns = room or condensed.columns
        held, recent = (columns.keys, columns.values), (dense.keys, dense.values)
        if self.latent:  # values are the first part of what is stored
            held, recent = ((keys, keys[..., : self.head_dim]) for keys, _ in (held, recent))
        out, _ = attend_tiers(
            query,
            *held,
            condensed.rows,
            *recent,
            dense.positions,
            dense.fill,
            bound=bound,
            start=start,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            new_mask=new_mask,
            padded=not dense.even,
            coding=self.tiers.coding(columns),
            attention=self.settings.attention,
        )
        return out

    # ------------------------------------------------------------------ storing

    def _needs_storing(self, new: NewTokens) -> bool:
        """Return True if these tokens are new, False if a later layer reads the same handle again.

        Raises:
            UnroutedKVError: the handle is stale.
        """
        if new.ingested_at is None and new.start == self.seen:
            return True
        if new.ingested_at == self.events and new.stop == self.seen:
            return False
        raise UnroutedKVError(
            f"layer {self.layer_idx}: attention asks for keys of columns {new.start} to {new.stop} after the cache "
            f"went on to {self.seen} columns and {self.events} events; keys of one forward pass cannot be reused later"
        )

    def _observe(self, query: Tensor, valid: Tensor | None, ring: QueryRing | None, new: NewTokens) -> QueryRing:
        """Return the query ring with the new queries, `[B, Hq, q, D]`.

        If the forward pass fails, the old ring must still hold the window before it. So the ring has one spare column,
        and more than one new column goes into a copy.
        """
        capacity, q_len = self.settings.window + 1, new.stop - new.start
        if self.record_past:
            # crop() may remove this round's columns, and the window before them must still exist then; a prompt comes
            # together with the first draft, whose length is unknown
            capacity += new.stop - self.committed if new.start else min(new.stop, self.settings.interval)
        if ring is None:
            ring = QueryRing(query, capacity)
        elif capacity > ring.capacity or (q_len > 1 and not self.record_past):
            ring = ring.resized(capacity, new.start)
        ring.append(query, valid, new.start)
        return ring

    def _store(self, new: NewTokens, tiers: Tiers, ring: QueryRing, scale: float, softcap: float | None) -> None:
        self.scale, self.softcap = scale, softcap
        prompt_length = self.prompt_length
        if prompt_length is None and ((self.record_past and new.start) or not self._in_prompt(new)):
            prompt_length = new.start or new.stop  # the first single token or verified draft ends the prompt
        # one statement without calls: an interrupt comes before all of it or after all of it
        self.tiers, self.ring, self.prompt_length, new.ingested_at = tiers, ring, prompt_length, tiers.events

    def _in_prompt(self, new: NewTokens) -> bool:
        """Return whether these tokens belong to the prompt. The first single token that `generate()` drew ends it."""
        if self.prompt_length is not None:
            return False
        return new.stop - new.start > 1 or (self.settings.pin_prompt and prefilling())

    def _check_pinned(self, new: NewTokens, padding: Tensor | None) -> None:
        limit = self.budget.limit
        if not self.settings.pin_prompt or limit is None:
            return
        prompt = new.stop if padding is None else int(padding.sum(1).max())
        if prompt + self.settings.window > limit:
            raise ValueError(
                f"pin_prompt=True: the prompt has {prompt} tokens, and with the window of {self.settings.window} that "
                f"exceeds the {limit} tokens a head may keep in layer {self.layer_idx} ({self.budget}): raise the "
                "budget or set pin_prompt=False"
            )


def _columns(padding: Tensor | None, new: NewTokens) -> Tensor | None:
    """Return the part of the padding that belongs to the new tokens, bool `[B, q]`."""
    return None if padding is None else padding[:, new.start : new.stop].bool()

"""Imitate a CUDA graph of a decode step on any device: run the recorded operators again on the same memory.

A replay runs no Python, so a step that depends on changing Python state fails.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hardkv.decoding import fixed_tokens
from hardkv.decoding.step import DecodeSteps

# Operators that read a tensor's content on the host; a capture fails at them.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}


class Recording(TorchDispatchMode):
    """Record the operators that run in this context, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record an operator."""
        name, kwargs = func._schema.name, kwargs or {}
        if name in WAITING:
            raise NotImplementedError(
                f"no graph holds {name}, which the host waits for: leave out custom_generate=graphed"
            )
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Run the operators again; write results into the memory of the recorded results."""
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)


@contextmanager
def replaying() -> Iterator[list[Recording]]:
    """Replay the static steps in this context; the value has one entry per replay.

    The PyTorch reference of attention reads host data that each event changes, so each event needs a new recording.
    """
    step, known, replays = DecodeSteps._run, {}, []

    def run(self: DecodeSteps) -> Tensor:
        running = self.running
        events = [layer.tiers.events for layer in running.layers.values()]
        place = running.addresses, running.padded, events, {name: id(value) for name, value in self._inputs.items()}
        old = known.get(running)
        if old is not None and old[0] == place:
            old[1].replay()
            replays.append(old[1])
            return old[2]
        with Recording() as recording, patch("torch.cuda.is_current_stream_capturing", lambda: True):
            logits = step(self)
        known[running] = place, recording, logits
        return logits

    # an operator that torch.compile treats as one reads host numbers
    seen_through = patch.object(fixed_tokens, "static_attention", fixed_tokens.static_attention._init_fn)
    with seen_through, patch.object(DecodeSteps, "_run", run):
        yield replays

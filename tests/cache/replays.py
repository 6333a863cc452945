"""What a CUDA graph makes of a decode step, on any device: the operators of one run, again on the same memory.

Nothing in Python runs at a replay, so a step that depends on what changes there goes wrong.
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

# Operators that tell the host what a tensor holds: a capture fails at them.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}


class Recording(TorchDispatchMode):
    """The operators that run within, with their very arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and note an operator."""
        name, kwargs = func._schema.name, kwargs or {}
        if name in WAITING:
            raise NotImplementedError(
                f"no graph holds {name}, which the host waits for: leave out custom_generate=graphed"
            )
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Run them again; results go to where those of the recording lie."""
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)


@contextmanager
def replaying() -> Iterator[list[Recording]]:
    """Static steps within are replayed; the value has one entry a replay.

    The PyTorch reference of attention reads what an event leaves on the host, so there is a new recording after each.
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

    # what torch.compile sees as one operator reads the host's numbers
    seen_through = patch.object(fixed_tokens, "static_attention", fixed_tokens.static_attention._init_fn)
    with seen_through, patch.object(DecodeSteps, "_run", run):
        yield replays

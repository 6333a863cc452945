"""Quantise tokens in plain code, one by one, in float64, as the docs of `hardkv.kernels.codes` say."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from hardkv.kernels.codes.reference import DEVIATION, LEVELS
from hardkv.kernels.codes.rotation import rotation


def quantised(state, centre, bits):
    """Return what a state `[D]` is read as after it was quantised."""
    if bits == 16:
        return state
    dim = state.shape[0]
    matrix = rotation(dim, torch.device("cpu"), torch.float64).numpy()
    rotated = (state - centre) @ matrix
    norm = math.sqrt(sum(x * x for x in rotated))
    if not norm:
        return centre
    if bits == 8:
        largest = max(abs(x) for x in rotated)
        found = np.array([round(x / largest * 127) for x in rotated]) / 64
    else:
        unit = rotated / norm * math.sqrt(dim) * DEVIATION[bits]
        table = np.array([sign * level for level in LEVELS[bits] for sign in (-1, 1)])
        found = table[abs(table - unit[:, None]).argmin(1)] / 64
    scale = float(np.float16(np.float32(norm / math.sqrt(sum(x * x for x in found)))))  # PyTorch rounds twice as well
    return matrix @ (found * scale) + centre


@dataclass
class CodedRow:
    """The tokens of one KV head of one sequence that left the dense tier."""

    bits: tuple
    held: dict = field(default_factory=dict)  # position -> (key, value), as read
    centres: tuple = ()

    def event(self, staying, dense, keys, values, sinks):
        """Update what is held after an event.

        Args:
            staying: positions in the ragged tiers after the event. dense: positions in the dense tier before it.
            keys, values: `[columns, D]`, true states. sinks: first tokens of the dense tier, which no mean counts.
        """
        if not self.held:
            counted = dense[sinks:]
            self.centres = tuple(
                states[counted].mean(0) if len(counted) else np.zeros(states.shape[1]) for states in (keys, values)
            )
        self.held = {
            position: self.held.get(position)
            or tuple(
                quantised(states[position], centre, bits)
                for states, centre, bits in zip((keys, values), self.centres, self.bits, strict=True)
            )
            for position in staying
        }

    def read(self, position, keys, values):
        """Return key and value of a position as attention and scorers read them."""
        return self.held.get(position, (keys[position], values[position]))

    def copy(self):
        """Return a row that goes on by itself."""
        return CodedRow(self.bits, dict(self.held), self.centres)

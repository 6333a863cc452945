"""The PyTorch references of `gather_codes`, `compact_codes` and `gather_states`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hardkv.kernels.codes.reference import decode, encode
from hardkv.kernels.rows import Rows

# Tokens that `gather_states_reference` decodes at a time: temporaries take several times what they become.
PART_TOKENS = 1 << 12


def gather_codes_reference(
    sources: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[Tensor],
    centres: tuple[Tensor, Tensor],
    bits: tuple[int, int],
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch reference of `gather_codes`. The host waits for the number of tokens that leave the dense tier."""
    *held, dense = sources
    chosen, ragged = address[index], sum(keys.shape[0] for keys, _ in held)
    new = chosen >= ragged
    place = torch.where(new, ragged + new.cumsum(0) - 1, chosen)
    _, heads, capacity, _ = dense[0].shape
    slot = chosen[new] - ragged
    row = slot.div(capacity, rounding_mode="floor")
    at = row // heads, row % heads, slot - row * capacity
    codes, new_scales = [], []
    for kind in (0, 1):
        states = dense[kind][at]
        scale = states.new_zeros(states.shape[0], dtype=torch.float16)
        if bits[kind] != 16:
            states, scale = encode(states, centres[kind][row], bits[kind])
        codes.append(torch.cat([*(tier[kind] for tier in held), states])[place])
        new_scales.append(scale)
    stored = torch.cat([*scales, torch.stack(new_scales, 1)])
    return codes[0], codes[1], positions[index], misses[index], stored[place]


def compact_codes_reference(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dense: tuple[Tensor, Tensor],
    centres: tuple[Tensor, Tensor],
    bits: tuple[int, int],
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> None:
    """The PyTorch reference of `compact_codes`; it gathers before it writes, so it does not use the row boundaries."""
    keys, values, _, _, scales = tokens
    sources, chosen = [(keys, values), dense], (address, index, positions, misses)
    for held, new in zip(tokens, gather_codes_reference(sources, [scales], centres, bits, *chosen), strict=True):
        held.copy_(new)


def gather_states_reference(
    sources: Sequence[Tensor],
    scales: Sequence[Tensor],
    centre: Tensor,
    kind: int,
    bits: int,
    address: Tensor,
    rows: Rows,
    out: Tensor,
) -> None:
    """The PyTorch reference of `gather_states`."""
    *held, dense = sources
    codes, scale, states = torch.cat([*held]), torch.cat([each[:, kind] for each in scales]), dense.flatten(0, 2)
    parts = (each.split(PART_TOKENS) for each in (address, rows.ids, out))
    for where, row, place in zip(*parts, strict=True):
        coded = where < codes.shape[0]
        chosen = where[coded]
        place[coded] = decode(codes[chosen], scale[chosen], centre[row[coded]], bits)
        place[~coded] = states[where[~coded] - codes.shape[0]]

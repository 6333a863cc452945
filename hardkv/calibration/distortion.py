"""The loss that fewer bits would cause, measured beside the loss by eviction and in its unit."""

import torch
from torch import Tensor

from hardkv.calibration.survey import Step
from hardkv.kernels.codes import BITS, decode, encode
from hardkv.kernels.dtypes import accumulation_dtype

# Bits whose loss is measured, in the order of `Calibration.distortion`.
QUANTISED = tuple(bits for bits in BITS if bits < 16)
# At most this many queries of a step are measured, evenly spaced.
QUERIES = 32


def distortion(step: Step) -> Tensor:
    """Return the loss by quantising the candidates' keys or values, float64 `[R, 2, bits]`, bits as in `QUANTISED`.

    The unit is that of `squared_attention`. Without token j, whose attention is a_j, the output misses about
    a_j (v_j - mean). If these differences are independent, the squared attention is the squared error of the output
    over the mean of |v_j - mean|^2. Quantising is measured as the squared error of the output over the same mean.
    """
    observation, dtype = step.observation, accumulation_dtype(step.observation.keys.dtype)
    rows = observation.num_rows
    keys, values = (
        states.view(rows, -1, states.shape[-1]).to(dtype) for states in (observation.keys, observation.values)
    )
    every = -(-step.queries.shape[2] // QUERIES)
    queries = step.queries[:, :, ::every].to(dtype)
    group = queries.shape[1] // observation.num_kv_heads
    queries = queries.reshape(rows, group, *queries.shape[2:])  # [R, G, q, D]
    coded = step.order[0].sort().values  # the candidates: the same columns in every row
    exact = _logits(step, queries, keys)
    future = torch.arange(keys.shape[1], device=keys.device) > step.positions[::every, None]
    sinks = None if step.sinks is None else step.sinks.to(dtype).view(-1, group).repeat(observation.batch_size, 1)

    def attention(logits: Tensor) -> Tensor:
        logits = logits.masked_fill(future, -torch.inf)
        if sinks is None:
            return logits.softmax(-1)
        column = sinks[:, :, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1]

    def squared(weights: Tensor, states: Tensor) -> Tensor:  # [R], of an error of the output
        return torch.einsum("rgqn,rnd->rgqd", weights, states).square().sum(-1).mean((1, 2))

    paid, own_values = attention(exact), values[:, coded]
    spread = (own_values - own_values.mean(1, keepdim=True)).square().sum(-1).mean(1)  # [R]
    lost = []
    for bits in QUANTISED:
        logits = exact.clone()
        logits[..., coded] = _logits(step, queries, _quantised(keys[:, coded], bits))
        by_keys = squared(attention(logits) - paid, values)
        by_values = squared(paid[..., coded], _quantised(own_values, bits) - own_values)
        lost.append(torch.stack([by_keys, by_values], -1))
    return torch.stack(lost, -1).double() / spread.clamp_min(torch.finfo(dtype).tiny).double()[:, None, None]


def _logits(step: Step, queries: Tensor, keys: Tensor) -> Tensor:
    """Return attention logits `[R, G, q, n]` of queries `[R, G, q, D]` and keys `[R, n, D]`."""
    logits = torch.einsum("rgqd,rnd->rgqn", queries, keys) * step.observation.scale
    softcap = step.observation.softcap
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _quantised(states: Tensor, bits: int) -> Tensor:
    """Return what codes of states `[R, n, D]` decode to, with each row's mean as its centre."""
    flat = states.flatten(0, 1)
    centre = states.mean(1, keepdim=True).expand_as(states).flatten(0, 1)
    return decode(*encode(flat, centre, bits), centre, bits).view_as(states)

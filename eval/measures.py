"""Measure the cost of eviction in other ways, to compare with `hardkv.calibration.survey.squared_attention`.

Each measure is a function of a `Step`, as for `hardkv.calibrate(measure=...)`, and returns the loss between two counts,
float64 `[R, K - 1]`. They need a Llama-like model with `model.model.layers[i].self_attn.o_proj`, and
one sequence at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hardkv.calibration.survey import Step

Measure = Callable[[Step], Tensor]


@dataclass
class _Parts:
    """Hold the attention of a step's queries; H KV heads, G query heads per KV head, q queries, n tokens."""

    probability: Tensor  # [H, G, q, n]
    values: Tensor  # [H, n, D]
    output: Tensor  # [H, G, q, D]
    order: Tensor  # [H, C]

    @classmethod
    def of(cls, step: Step) -> "_Parts":
        observation, heads = step.observation, step.observation.num_kv_heads
        keys = observation.keys.view(heads, -1, observation.keys.shape[-1]).float()
        values = observation.values.view(heads, -1, observation.values.shape[-1]).float()
        queries = step.queries[0].float().unflatten(0, (heads, -1))
        logits = torch.einsum("hgqd,hnd->hgqn", queries, keys) * observation.scale
        future = torch.arange(keys.shape[1], device=keys.device) > step.positions[:, None]
        probability = logits.masked_fill(future, -torch.inf).softmax(-1)
        return cls(probability, values, torch.einsum("hgqn,hnd->hgqd", probability, values), step.order)

    def ordered(self, per_query: Tensor) -> Tensor:
        """Gather the candidates from `[H, G, q, n]`, in their order: `[H, G, q, C]`."""
        return per_query.gather(3, self.order[:, None, None].expand(*per_query.shape[:3], -1))

    def projection(self, model: Any, layer_idx: int) -> Tensor:
        """Return the weight of `o_proj` by query heads, float32 `[hidden, H, G, D]`."""
        heads, group, _, head_dim = self.output.shape
        return model.model.layers[layer_idx].self_attn.o_proj.weight.float().view(-1, heads, group, head_dim)


def _between(per_token: Tensor, edges: Tensor) -> Tensor:
    """Sum `[H, C]` between edges."""
    return F.pad(per_token.double().cumsum(1), (1, 0))[:, edges].diff(dim=1)


def squared_value(step: Step) -> Tensor:
    """Return the squared attention times the squared norm of the attended value."""
    parts = _Parts.of(step)
    weight = parts.probability.square().mean((1, 2)) * parts.values.square().sum(-1)
    return _between(weight.gather(1, step.order), step.edges)


def output_error(model: Any, relative: bool) -> Measure:
    """Return the squared error of the attention output after `o_proj`, with the remaining attention renormalised.

    Args:
        relative: divide by the squared norm of the head's part of the output.
    """

    def measure(step: Step) -> Tensor:
        parts, edges = _Parts.of(step), step.edges.tolist()
        heads, _, _, head_dim = parts.output.shape
        weight = parts.projection(model, step.layer_idx)
        probability = parts.ordered(parts.probability)
        values = parts.values.gather(1, step.order[..., None].expand(-1, -1, head_dim))
        lost, mass = torch.zeros_like(parts.output), torch.zeros_like(parts.output[..., :1])

        def squared(vector: Tensor) -> Tensor:  # [H], after o_proj, mean over queries and group
            return torch.einsum("ihgd,hgqd->hgqi", weight, vector).square().sum(-1).mean((1, 2)).double()

        losses = [torch.zeros(heads, dtype=torch.float64, device=lost.device)]
        for low, high in reversed(list(pairwise(edges))):
            lost = lost + torch.einsum("hgqn,hnd->hgqd", probability[..., low:high], values[:, low:high])
            mass = mass + probability[..., low:high].sum(-1, keepdim=True)
            losses.append(squared((parts.output - lost) / (1 - mass).clamp_min(1e-6) - parts.output))
        loss = torch.stack(losses[::-1], 1)
        return -(loss / squared(parts.output)[:, None] if relative else loss).diff(dim=1)

    return measure


def long_horizon_utility(model: Any) -> Measure:
    """Return the utility of each token in the sense of LU-KV (https://arxiv.org/abs/2602.08585).

    A query head weights a token by its attention times the norm of the token's value after `o_proj`. The utility is the
    largest weight over a step's queries and the query heads of a group. Norms are divided by their mean in the layer.
    LU-KV takes the queries of an answer, and we those of the next step.
    """

    def measure(step: Step) -> Tensor:
        parts = _Parts.of(step)
        weight = parts.projection(model, step.layer_idx)
        gram = torch.einsum("ihgd,ihge->hgde", weight, weight)
        norm = torch.einsum("hnd,hgde,hne->hgn", parts.values, gram, parts.values).clamp_min(0.0).sqrt()
        utility = (parts.probability * (norm / norm.mean())[:, :, None]).amax((1, 2))
        return _between(utility.gather(1, step.order), step.edges)

    return measure


def gradient(model: Any, ids: Tensor) -> Measure:
    """Return each token's squared first-order effect on the text's loss: `(P_j * g . (v_j - o))^2`, mean over queries.

    g is the gradient of the text's negative log-likelihood with respect to the head's output o, from one backward pass.

    Args:
        ids: the text of the steps, `[1, n]`.
    """
    outputs: list[Tensor] = []

    def note(module: Any, inputs: tuple[Tensor]) -> None:
        inputs[0].retain_grad()
        outputs.append(inputs[0])

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(note) for layer in model.model.layers]
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
        F.cross_entropy(logits, ids[0, 1:], reduction="sum").backward(inputs=[embedded])
    for hook in hooks:
        hook.remove()

    def measure(step: Step) -> Tensor:
        parts = _Parts.of(step)
        shape = parts.output.shape
        slope = outputs[step.layer_idx].grad[0, step.positions]  # [q, Hq * D]
        slope = slope.view(-1, shape[0] * shape[1], shape[3]).transpose(0, 1).reshape(shape).float()
        effect = torch.einsum("hgqd,hnd->hgqn", slope, parts.values) - (slope * parts.output).sum(-1, keepdim=True)
        effect = (parts.probability * effect).square().mean((1, 2))
        return _between(effect.gather(1, step.order), step.edges)

    return measure

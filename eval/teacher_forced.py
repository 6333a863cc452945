"""Measure the cost of compression on a given text: the loss per token, dense and with compressed caches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hardkv.cache.argument import argument_of


@dataclass
class Result:
    """Hold the results of one cache on B texts; every figure is a mean over the counted tokens."""

    nll: list[float]  # [B], nats per token
    dense_nll: list[float]
    kl: list[float]  # [B], KL divergence of the dense next-token distribution from the compressed one, nats
    agreement: list[float]  # [B], how often both choose the same next token
    nbytes: float  # bytes that all sequences hold, mean over events
    dense_nbytes: float

    @property
    def excess(self) -> list[float]:
        """Return the NLL above the dense cache's, `[B]`."""
        return [ours - dense for ours, dense in zip(self.nll, self.dense_nll, strict=True)]


@torch.inference_mode()
def teacher_forced(
    model: Any,
    ids: Tensor,
    caches: Mapping[str, Callable[[], Any]],
    *,
    step: int = 128,
    count_from: float = 1 / 4,
) -> dict[str, Result]:
    """Run texts through a model in steps, with a dense cache and with each compressed cache, and compare.

    Every step is one forward of `step` tokens, so with `interval=step` a cache compresses after each step. Tokens count
    from position `count_from` on.

    Args:
        ids: int64 `[B, n]`, no padding.
        caches: functions that make a new cache with a method `nbytes`, by name.
    """
    batch, length = ids.shape
    dense, ours = DynamicCache(config=model.config), {name: make() for name, make in caches.items()}
    sums = {name: torch.zeros(4, batch, dtype=torch.float64, device=ids.device) for name in ours}
    held = dict.fromkeys(ours, 0.0)
    counted = steps = dense_bytes = 0
    for start in range(0, length - 1, step):
        chunk, target = ids[:, start : start + step], ids[:, start + 1 : start + step + 1]
        counts = start >= count_from * length
        reference = log_probabilities(model, chunk, dense, counts)
        for name, cache in ours.items():
            log_q = log_probabilities(model, chunk, cache, counts)
            if counts:
                sums[name] += compare(reference[:, : target.shape[1]], log_q[:, : target.shape[1]], target)
                held[name] += cache.nbytes()
        if counts:
            counted += target.shape[1]
            steps += 1
            dense_bytes += sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    return {
        name: Result(*(row.tolist() for row in total / counted), held[name] / steps, dense_bytes / steps)
        for name, total in sums.items()
    }


def log_probabilities(model: Any, chunk: Tensor, cache: Any, whole: bool, **arguments: Any) -> Tensor:
    """Return float32 log-probabilities of the next tokens, `[B, q, V]`, or of the last one only.

    Args:
        chunk: int64 `[B, q]`. arguments: more arguments of the model's `forward`.
    """
    arguments |= {argument_of(model): cache, "use_cache": True, "logits_to_keep": 0 if whole else 1}
    logits = model(input_ids=chunk, **arguments).logits
    return logits.float().log_softmax(-1)


def compare(reference: Tensor, log_q: Tensor, target: Tensor) -> Tensor:
    """Return sums over tokens, float64 `[4, B]`: NLL, dense NLL, KL, agreement."""
    picked = [-log_p.gather(-1, target[..., None])[..., 0].double().sum(1) for log_p in (log_q, reference)]
    kl = (reference.exp() * (reference - log_q)).sum(-1).double().sum(1)
    same = (reference.argmax(-1) == log_q.argmax(-1)).double().sum(1)
    return torch.stack([*picked, kl, same])

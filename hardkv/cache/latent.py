"""Multi-head latent attention (DeepSeek's MLA): one latent a token, expanded to every head's key and value.

The cache holds the latents, one ragged row for all heads. `module.expand_kv` is linear, so instead of expanding what is
held at every step, as transformers does, queries are taken into the space of the latents and results out of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.handles import ExpandedHandle, KVHandle, NewTokens, UnroutedKVError


@dataclass(frozen=True)
class Latent:
    """The linear maps between the heads of one layer and its latents, of width C, and rotated keys, of width P."""

    expand_kv: Any  # the model's own
    keys: Tensor  # [Hq, C + P, D]
    values: Tensor  # [Hq, C, Dv]

    @classmethod
    def of(cls, module: Any, key: KVHandle) -> "Latent | None":
        """What connects the model's heads with what the cache holds; None for layers that hold keys and values.

        Raises:
            UnroutedKVError: the keys were projected after they came from the cache, in a way of the model's own.
        """
        if not isinstance(key, ExpandedHandle):
            if key.new.layer.latent:
                raise UnroutedKVError(
                    f"the config of {type(module).__name__} has a kv_lora_rank, but it attends to what the cache gives "
                    "without expanding it: use DynamicCache for this model"
                )
            return None
        if not hasattr(module, "expand_kv"):
            raise UnroutedKVError(
                f"{type(module).__name__} changes keys and values between cache and attention, and has no expand_kv "
                "to tell how: use DynamicCache for this model"
            )
        width, rotated = key.new.keys.shape[-1], key.new.values.shape[-1]
        unit = torch.eye(width + rotated, dtype=key.dtype, device=key.device)[None, None]
        with torch.no_grad():
            keys, values = module.expand_kv(unit[..., :width], unit[..., width:])
        return cls(module.expand_kv, keys[0], values[0, :, :width])

    def expand(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Keys `[B, Hq, q, D]` and values `[B, Hq, q, Dv]` of new tokens, as the model itself makes them."""
        return self.expand_kv(*new.given)

    def absorb(self, query: Tensor) -> Tensor:
        """Queries `[B, Hq, q, D]` as `[B, Hq, q, C + P]`, whose products with latents are those with expanded keys."""
        return query @ self.keys.mT

    def emit(self, out: Tensor) -> Tensor:
        """Attention over latents, `[B, Hq, q, C]`, as attention over values, `[B, Hq, q, Dv]`."""
        return out @ self.values

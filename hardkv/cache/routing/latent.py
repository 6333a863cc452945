"""Multi-head latent attention (DeepSeek's MLA): one latent a token, expanded to every head's key and value.

The cache holds the latents, one ragged row for all heads. `module.expand_kv` is linear, so instead of expanding what is
held at every step, as transformers does, queries are taken into the space of the latents and results out of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.routing.handles import ExpandedHandle, KVHandle, UnroutedKVError

# What the layout's check lets pass, relative to the largest number: rounding in half precision, and nothing else.
ROUNDING = 0.05


@dataclass(frozen=True)
class Latent:
    """The linear maps between the heads of one layer and its latents, of width C; views of the model's own weight.

    A head's key is what the map makes of the latent, and behind it the rotated key, of width P, that all heads share.
    """

    expand_kv: Any  # the model's own
    keys: Tensor  # [Hq, D - P, C]
    values: Tensor  # [Hq, Dv, C]

    @classmethod
    def of(cls, module: Any, key: KVHandle, query: Tensor) -> "Latent | None":
        """What connects the model's heads with what the cache holds; None for layers that hold keys and values.

        Args:
            key: what the model attends to. query: `[B, Hq, q, D]`.

        Raises:
            UnroutedKVError: the keys were projected after they came from the cache, in a way of the model's own.
        """
        if not isinstance(key, ExpandedHandle):
            if key.new.latent:
                raise UnroutedKVError(
                    f"the config of {type(module).__name__} has a kv_lora_rank, but it attends to what the cache gives "
                    "without expanding it: use DynamicCache for this model"
                )
            return None
        if not hasattr(module, "expand_kv") or key.weight is None:
            raise UnroutedKVError(
                f"{type(module).__name__} changes keys and values between cache and attention, and has no expand_kv "
                "to tell how: use DynamicCache for this model"
            )
        weight = key.weight.detach().to(query.dtype).unflatten(0, (query.shape[1], -1))  # [Hq, D - P + Dv, C]
        plain = query.shape[-1] - key.new.given[1].shape[-1]
        return cls(module.expand_kv, weight[:, :plain], weight[:, plain:])

    def expand(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys `[B, Hq, q, D]` and values `[B, Hq, q, Dv]` of latents and rotated keys, as the model itself makes them.

        Raises:
            UnroutedKVError: that is not what these maps make of them.
        """
        keys, values = self.expand_kv(*given)
        latent, rotated = (states[:, :, -1:].detach().to(self.keys.dtype) for states in given)  # one token tells
        ours = latent @ self.keys.mT, rotated.expand(-1, keys.shape[1], -1, -1), latent @ self.values.mT
        theirs, expected = torch.cat([keys[:, :, -1:], values[:, :, -1:]], -1).detach(), torch.cat(ours, -1)
        if theirs.shape != expected.shape or (theirs - expected).abs().max() > ROUNDING * theirs.abs().max():
            raise UnroutedKVError(
                "expand_kv of this model lays keys and values out in another way than a projection of the latent "
                "before what is rotated: use DynamicCache for this model"
            )
        return keys, values

    def absorb(self, query: Tensor) -> Tensor:
        """Queries `[B, Hq, q, D]` as `[B, Hq, q, C + P]`, whose products with latents are those with expanded keys."""
        plain = self.keys.shape[1]
        return torch.cat([query[..., :plain] @ self.keys, query[..., plain:]], -1)

    def emit(self, out: Tensor) -> Tensor:
        """Attention over latents, `[B, Hq, q, C]`, as attention over values, `[B, Hq, q, Dv]`."""
        return out @ self.values.mT

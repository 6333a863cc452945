"""Multi-head latent attention (DeepSeek's MLA): one latent per token, expanded to the keys and values of all heads.

The cache holds the latents, in one ragged row for all heads. transformers expands all held latents at every step. Since
`module.expand_kv` is linear, hardkv instead maps the queries into the latent space and the results back out of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardkv.cache.routing.handles import ExpandedHandle, KVHandle, UnroutedKVError

# Largest error that `expand` accepts, relative to the largest number: enough for rounding in half precision.
ROUNDING = 0.05


@dataclass(frozen=True)
class Latent:
    """The linear maps from latents of width C to the keys and values of one layer's heads; views of the model's weight.

    The key of a head is the mapped latent followed by the rotated key of width P, which all heads share.
    """

    expand_kv: Any  # the model's own function
    keys: Tensor  # [Hq, D - P, C]
    values: Tensor  # [Hq, Dv, C]

    @classmethod
    def of(cls, module: Any, key: KVHandle, query: Tensor) -> "Latent | None":
        """Return the maps between the model's heads and the latents held; None for layers that hold keys and values.

        Args:
            key: the handle that the model attends to. query: `[B, Hq, q, D]`.

        Raises:
            UnroutedKVError: the model changed the keys after the cache in a way that hardkv does not know.
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
        """Return keys `[B, Hq, q, D]` and values `[B, Hq, q, Dv]`, made by the model from latents and rotated keys.

        Raises:
            UnroutedKVError: the model's result differs from the result of these maps.
        """
        keys, values = self.expand_kv(*given)
        latent, rotated = (states[:, :, -1:].detach().to(self.keys.dtype) for states in given)  # check one token
        ours = latent @ self.keys.mT, rotated.expand(-1, keys.shape[1], -1, -1), latent @ self.values.mT
        theirs, expected = torch.cat([keys[:, :, -1:], values[:, :, -1:]], -1).detach(), torch.cat(ours, -1)
        if theirs.shape != expected.shape or (theirs - expected).abs().max() > ROUNDING * theirs.abs().max():
            raise UnroutedKVError(
                "expand_kv of this model lays keys and values out in another way than a projection of the latent "
                "before what is rotated: use DynamicCache for this model"
            )
        return keys, values

    def absorb(self, query: Tensor) -> Tensor:
        """Map queries `[B, Hq, q, D]` to `[B, Hq, q, C + P]`: same products with latents as with the expanded keys."""
        plain = self.keys.shape[1]
        return torch.cat([query[..., :plain] @ self.keys, query[..., plain:]], -1)

    def emit(self, out: Tensor) -> Tensor:
        """Map attention over latents, `[B, Hq, q, C]`, to attention over values, `[B, Hq, q, Dv]`."""
        return out @ self.values.mT

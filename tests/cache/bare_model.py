"""Use caches like a model of attention layers alone, without weights."""

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hardkv.cache.argument import CACHE


class Attention(torch.nn.Module):
    """Provide the attributes that hardkv and transformers' kernels read from a model's attention module."""

    is_causal = True

    def __init__(self, layer_idx: int, group: int):
        super().__init__()
        self.layer_idx, self.num_key_value_groups = layer_idx, group


class BareModel:
    """The config and the attention modules of a model."""

    def __init__(self, layers: int, heads: int, group: int, dim: int, scale: float):
        self.scale = scale
        self.config = LlamaConfig(
            vocab_size=8,
            hidden_size=heads * group * dim,
            num_attention_heads=heads * group,
            num_key_value_heads=heads,
            head_dim=dim,
            num_hidden_layers=layers,
            attn_implementation="sdpa",
        )
        self.modules = [Attention(idx, group).eval() for idx in range(layers)]

    def attend(
        self, cache: object, queries: Tensor, keys: Tensor, values: Tensor, exists: Tensor | None
    ) -> list[Tensor]:
        """Use a cache like a forward pass: make a mask, then call `update` and attention per layer.

        Args:
            queries: `[L, B, Hq, q, D]`. keys, values: `[L, B, H, q, D]`.
            exists: bool `[B, columns so far]`, the 2D attention mask.

        Returns:
            Per layer `[B, Hq, q, D]`.
        """
        embeds = torch.empty(queries.shape[1], queries.shape[3], 1)
        mask = create_causal_mask(config=self.config, inputs_embeds=embeds, attention_mask=exists, **{CACHE: cache})
        out = []
        for module, query, key, value in zip(self.modules, queries, keys, values, strict=True):
            handles = cache.update(key, value, module.layer_idx)
            result, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *handles, mask, dropout=0.0, scaling=self.scale)
            out.append(result.transpose(1, 2))
        return out

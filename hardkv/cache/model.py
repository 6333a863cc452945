"""Everything that hardkv reads from a model's config. No other file reads a config."""

from dataclasses import dataclass
from typing import Any

# Fields of a config that decide whether a calibration fits the model.
GEOMETRY = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class Traits:
    """A model as its config describes it. Every property reads the config each time.

    The layers of some models differ (Gemma 4: full layers have larger heads). Their config lists the fields that vary
    in `per_layer_attributes`, and raises RuntimeError if such a field is read as one value.

    Args:
        config: `model.config`.
        text: the decoder's part of it; `config` itself if the model is only a decoder.
    """

    config: Any
    text: Any

    @classmethod
    def of(cls, config: Any) -> "Traits":
        """Return the traits of a model from its config.

        Raises:
            TypeError: `config` is not a model's config.
        """
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"config={type(config).__name__} must be a model's config: HardKVCache(config=model.config)"
            )
        return cls(config, config.get_text_config(decoder=True))

    def _varies(self, name: str) -> bool:
        return name in (getattr(self.text, "per_layer_attributes", None) or ())

    # ------------------------------------------------------------------ which model it is

    @property
    def name(self) -> str:
        """The checkpoint's folder or hub id; empty for a model made from a config."""
        return str(getattr(self.config, "_name_or_path", "") or "")

    @property
    def model_type(self) -> str:
        """Transformers' name of the architecture."""
        return self.config.model_type

    @property
    def geometry(self) -> dict[str, Any]:
        """What a calibration stores about a model: each field of `GEOMETRY`, as a list over layers if the field varies.

        None for fields that the config does not have.
        """
        return {
            name: [getattr(layer, name) for layer in self.text.per_layer_config]
            if self._varies(name)
            else getattr(self.text, name, None)
            for name in GEOMETRY
        }

    # ------------------------------------------------------------------ layers

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self.text.num_hidden_layers

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of attention of every layer; empty if the config does not list them."""
        return tuple(getattr(self.text, "layer_types", None) or ())

    @property
    def cross_attention_layers(self) -> frozenset[int]:
        """Indices of layers that attend to a picture instead of the text."""
        return frozenset(getattr(self.text, "cross_attention_layers", None) or ())

    @property
    def shares_keys(self) -> bool:
        """Whether some layers read another layer's keys. They do so after that layer's attention ran."""
        modes = getattr(self.text, "kv_sharing_modes", None) or ()
        return bool(getattr(self.text, "num_kv_shared_layers", 0)) or any(modes)

    @property
    def latent(self) -> bool:
        """Whether the model has latent attention (MLA)."""
        return self._varies("kv_lora_rank") or bool(getattr(self.text, "kv_lora_rank", None))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder before the decoder."""
        return self.config.is_encoder_decoder

    def heads(self, layer_idx: int) -> tuple[int, int, int, int]:
        """Return the query heads, the KV heads, and the widths of their keys and values in one layer."""
        layer = self.text.per_layer_config[layer_idx]
        query_heads = layer.num_attention_heads
        heads = getattr(layer, "num_key_value_heads", None) or query_heads
        if getattr(layer, "multi_query", False):  # GPTBigCode
            heads = 1
        dim = getattr(layer, "head_dim", None) or layer.hidden_size // query_heads
        return query_heads, heads, dim, getattr(layer, "v_head_dim", None) or dim

    # ------------------------------------------------------------------ positions

    @property
    def max_positions(self) -> int | None:
        """The most tokens that the model was made for; None if the config does not say."""
        return getattr(self.text, "max_position_embeddings", None)

    @property
    def original_max_positions(self) -> int | None:
        """Tokens after which LongRoPE (Phi-3) changes; None for a model without it."""
        return getattr(self.config, "original_max_position_embeddings", None)

    @property
    def rotates_anew(self) -> bool:
        """Whether the model rotates all keys differently once a text exceeds `original_max_positions` tokens."""
        if self.original_max_positions is None:
            return False
        return self.config.rope_parameters.get("rope_type", "default") != "default"

    @property
    def rope(self) -> Any:
        """The rotary embedding as in the config's JSON; None without one."""
        return self.text.to_dict().get("rope_parameters")

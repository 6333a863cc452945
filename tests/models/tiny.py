"""A tiny random model of any architecture that transformers lists as a causal language model.

The config comes from the type's own defaults: every size that is known by name becomes small, and of the layers only
a few are kept, so that each kind of layer occurs. A table names what these rules do not find by themselves.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 98
PAD = 0
LAYERS = 3  # at least; more where there are more kinds

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, POSITIONS, WINDOW = 32, 4, 2, 8, 512, 6
# Where a default config has one of these names, and not None, it gets the value.
SIZES: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (HIDDEN, "hidden_size d_model n_embd emb_dim embedding_size embedding_dim input_embedding_size lru_width"),
    (HIDDEN, "output_embedding_size word_embed_proj_dim attention_hidden_size"),
    (HIDDEN, "adapter_in_dim adapter_input_size adapter_out_dim"),
    (48, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff d_inner n_inner"),
    (48, "dense_intermediate_size intermediate_size_mlp shared_intermediate_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    (16, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (LAYERS, "decoder_layers encoder_layers num_encoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (HEADS, "decoder_attention_heads encoder_attention_heads"),
    (HEADS, "num_decoder_attention_heads num_encoder_attention_heads"),
    (KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups"),
    (HEAD_DIM, "head_dim swa_head_dim v_head_dim swa_v_head_dim qk_nope_head_dim kv_channels d_head dim_head"),
    (HEAD_DIM, "query_pre_attn_scalar kv_lora_rank q_lora_rank o_lora_rank index_head_dim adapter_rank"),
    (4, "qk_rope_head_dim rotary_dim index_n_heads d_rel"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"),
    (POSITIONS, "original_max_position_embeddings"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size attention_chunk_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk"),
    (1, "num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace"),
    (1, "n_group num_expert_group topk_group zero_expert_num"),
    (HEADS, "linear_num_key_heads linear_num_value_heads linear_num_heads"),
    (HEAD_DIM, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (4, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    (16, "mamba_d_head mamba_head_dim mamba_chunk_size chunk_size"),
    (64, "mamba_d_ssm"),
    (8, "mamba_d_state ssm_state_size state_size time_step_rank mamba_dt_rank"),
    (1, "mamba_n_groups n_groups"),
    (8, "hidden_size_per_layer_input laurel_rank hc_lowrank router_hidden_size"),
    (2.0, "attn_logit_softcapping"),  # low enough to matter
    (None, "rope_scaling"),
    (False, "tie_word_embeddings"),
]
SMALL = {name: value for value, names in SIZES for name in names.split()}
# Where the number of layers stands; the first that a default config has counts.
LAYER_COUNTS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"]
SPECIAL_TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}

# What the rules above do not find.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "dots3_note_text": {
        "head_dim": 16,
        "per_layer_config": {
            2: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 12}
        },
    },
    "longcat_flash": {"num_layers": LAYERS},
    "mamba2": {"head_dim": 16},
    "gemma4_text": {"per_layer_config": {2: {"head_dim": 16}}},
    "gemma4_unified_text": {"per_layer_config": {2: {"head_dim": 16}}},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": [1]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 50,
        "ple_embed_dim": 8,
        "make_ngram_vocab_size_divisible_by": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 64]},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 16, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}


def tiny_arguments(default: PreTrainedConfig) -> dict[str, Any]:
    """Config arguments that shrink a default config; those of its sub-configs as dicts."""
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    arguments = {name: small for name, small in SMALL.items() if values.get(name) is not None}
    arguments |= {name: value for name, value in SPECIAL_TOKENS.items() if name in values}
    arguments |= {name: SMALL[name] for name in ("head_dim", "num_key_value_heads") if name in values}
    if "kv_lora_rank" in values:  # latent attention has no groups, and head_dim is what its positions rotate
        arguments |= {"num_key_value_heads": HEADS, "head_dim": SMALL["qk_rope_head_dim"]}
    if "is_decoder" in values:
        arguments["is_decoder"] = True
    for name in values:
        if isinstance(values[name], PreTrainedConfig):
            arguments[name] = tiny_arguments(values[name])
    count = next((name for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    if count is not None:
        kept = kept_layers(values, values[count])
        arguments[count] = len(kept)
        for name in per_layer(values, values[count]):
            arguments[name] = [values[name][idx] for idx in kept]
        for name in layer_indices(values, values[count]):
            arguments[name] = [new for new, idx in enumerate(kept) if idx in values[name]]
    for name, value in OVERRIDES.get(default.model_type, {}).items():
        arguments[name] = arguments[name] | value if isinstance(arguments.get(name), dict) else value
    return arguments


def per_layer(values: dict[str, Any], count: int) -> list[str]:
    """Names of the lists with one entry a layer."""
    lists = [name for name, value in values.items() if isinstance(value, list | tuple) and len(value) == count > 1]
    return [name for name in lists if name not in layer_indices(values, count)]


def layer_indices(values: dict[str, Any], count: int) -> list[str]:
    """Names of the lists of layers' indices."""
    names = [name for name, value in values.items() if isinstance(value, list) and len(value) > 1 and "layer" in name]
    return [name for name in [*names, "full_attn_idxs"] if ascending(values.get(name), count)]


def ascending(value: Any, count: int) -> bool:
    ints = isinstance(value, list) and all(type(idx) is int for idx in value)
    return ints and value == sorted(set(value)) and value[-1] < count and value[-1] > 1


def kept_layers(values: dict[str, Any], count: int) -> list[int]:
    """Layers that cover every kind, by every list that says something of layers, and `LAYERS` at least."""
    kinds: dict[str, int] = {}
    for idx in range(count):
        kind = [values[name][idx] for name in per_layer(values, count)]
        kinds.setdefault(str(kind + [idx in values[name] for name in layer_indices(values, count)]), idx)
    kept = set(kinds.values())
    for idx in range(count):
        if len(kept) < LAYERS:
            kept.add(idx)
    return sorted(kept)


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A config of the type, for some ten thousand parameters; `overrides` are config arguments."""
    klass = CONFIG_MAPPING[model_type]
    return klass(**(tiny_arguments(klass()) | overrides))


def tiny_model(
    model_type: str, seed: int = 0, *, attn: str | None = None, kind: Any = AutoModelForCausalLM, **overrides: Any
) -> PreTrainedModel:
    """A tiny random model in eval mode on the default device.

    Args:
        attn: its attention implementation; None for what transformers chooses. kind: another auto class.
        overrides: config arguments.
    """
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same weights everywhere
        torch.manual_seed(seed)  # for what keeps its initial value
        model = kind.from_config(tiny_config(model_type, **overrides), attn_implementation=attn).eval()
    return randomize(model, seed).to(device)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    """Tokens, int64 on the default device: the same on each, and none of those that mean something."""
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(2, VOCABULARY - 8, shape, generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def random_normal(*shape: int, seed: int = 0) -> Tensor:
    """Float32 on the default device, the same on each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights at which activations are O(1) and attention is uneven; norms, biases and decays keep their values."""
    generator = torch.Generator("cpu").manual_seed(seed)
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name = path.rsplit(".", 2)[-2:]
            if path.endswith("sinks"):
                draw(parameter, 1, generator)
            elif "gate" in path and parameter.numel() == 1:
                parameter.fill_(0.5)  # Mllama's start closed
            elif parameter.ndim >= 2 and parameter.is_floating_point():
                scale = parameter.shape[-1] ** -0.5
                if id(parameter) in embeddings:
                    scale = 1.0
                elif any(part in "".join(name) for part in ("q_proj", "k_proj", "c_attn", "qkv", "query", "key")):
                    scale *= 1.5
                draw(parameter, scale, generator)
    return model


def draw(parameter: Tensor, scale: float, generator: torch.Generator) -> None:
    """Fill with normal numbers of a CPU generator, wherever the parameter is."""
    drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    parameter.copy_(drawn.normal_(0, scale, generator=generator))

"""Models of pictures and text, with a picture in the prompt: the same verdict as their language models alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from hardkv import HardKVCache
from tests.models.probe import EVICT, PROMPT, SUPPORTED, probe_model, run
from tests.models.tiny import PAD, VOCABULARY, random_ids, random_normal, randomize

IMAGE = 96  # the placeholder of one image token
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def prompt(image_tokens: int) -> dict[str, Tensor]:
    """Two rows with a picture each, the first left-padded."""
    ids = random_ids(2, PROMPT)
    ids[:, 4 : 4 + image_tokens] = IMAGE
    ids[0, :3] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def gemma3() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    text = TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
    text["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=94,
        eoi_token_index=95,
        pad_token_id=PAD,
        eos_token_id=None,
    )
    inputs = prompt(4)
    inputs |= {"pixel_values": random_normal(2, 3, 28, 28), "token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    return Gemma3ForConditionalGeneration(config), inputs


def llava() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        pad_token_id=PAD,
    )
    return LlavaForConditionalGeneration(config), prompt(4) | {"pixel_values": random_normal(2, 3, 28, 28)}


def qwen2_5_vl() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=95,
        vision_start_token_id=94,
        vision_end_token_id=93,
    )
    inputs = prompt(4)
    inputs["input_ids"][:, 3] = 94  # a picture starts
    inputs["attention_mask"][:, 3] = 1
    inputs |= {"pixel_values": random_normal(2 * 16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return Qwen2_5_VLForConditionalGeneration(config), inputs


def mllama() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}},
        vision_config=VISION
        | {
            "attention_heads": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )
    inputs = prompt(1) | {
        "pixel_values": random_normal(2, 1, 1, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, PROMPT, 1, 1, dtype=torch.long),
    }
    return MllamaForConditionalGeneration(config), inputs


@pytest.mark.parametrize(("build", "compressed"), [(gemma3, 2), (llava, 3), (qwen2_5_vl, 3), (mllama, 2)])
def test_random_normal(build, compressed):
    model, inputs = build()
    randomize(model.eval())
    verdict = probe_model(model, **inputs)
    assert (verdict.status, verdict.compressed, verdict.layers) == (SUPPORTED, compressed, 3), verdict
    # the picture is looked at, so that what was compared depends on it
    logits = [
        run(model, HardKVCache(config=model.config, **EVICT), **(inputs | {"pixel_values": pixels}))
        for pixels in (inputs["pixel_values"], -inputs["pixel_values"])
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3

"""Weights in 8 and 4 bits, where bitsandbytes is installed (pip install bitsandbytes; it has a CPU backend)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.models.probe import SUPPORTED, probe_model
from tests.models.tiny import randomize, tiny_config

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(bits, tmp_path):
    tiny = tiny_config("qwen3")
    tiny.hidden_size = tiny.intermediate_size = 128  # bitsandbytes packs blocks of 64 weights
    model = AutoModelForCausalLM.from_config(tiny)
    randomize(model)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert any(type(module).__name__ in ("Linear8bitLt", "Linear4bit") for module in model.modules())
    verdict = probe_model(model)
    assert (verdict.status, verdict.compressed) == (SUPPORTED, model.config.num_hidden_layers), verdict.reason

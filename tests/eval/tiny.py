"""A tiny random checkpoint with a tokenizer of single characters: what the harness needs of a model, in no time."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import VOCABULARY, tiny_model

SPECIAL = ("<pad>", "<bos>", "<eos>")
CHARACTERS = [chr(code) for code in range(32, 127)]
TEMPLATE = (
    "{% for message in messages %}Q{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character; others are unknown, as the pad."""
    names = [*SPECIAL, *CHARACTERS]
    assert len(names) == VOCABULARY
    inner = Tokenizer(WordLevel({name: idx for idx, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=TEMPLATE
    )


def model(model_type: str = "qwen3") -> Any:
    """Random, with an end token, sampled at a temperature."""
    made: Any = tiny_model(model_type)
    config = made.generation_config
    config.eos_token_id, config.pad_token_id = 2, 0
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 0.9, 40, 0.95
    return made


def checkpoint(folder: Path) -> Path:
    """Both, saved."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

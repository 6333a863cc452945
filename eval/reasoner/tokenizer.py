r"""Build the reasoner's tokenizer: one token per character, per kind of problem, and for `\boxed{`."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eval.reasoner.problems import DIGITS, KINDS, LETTERS

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
WORDS = (*KINDS, "to", r"\boxed{")
CHARACTERS = (*LETTERS, *DIGITS, *"+-=;: }\n")
# One message and a line break, before the solution.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer, with pad, bos (put first), eos, unk and a chat template; `decode` inverts encoding."""
    names = [PAD, BOS, EOS, UNK, *WORDS, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({name: idx for idx, name in enumerate(names)}, unk_token=UNK))
    words = "|".join(WORDS).replace("\\", "\\\\").replace("{", "\\{")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, names.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",  # for generation in batches
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )

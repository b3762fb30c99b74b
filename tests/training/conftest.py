"""A byte-level tokenizer with ChatML, small enough to check by hand."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers


class ByteTokenizer:
    """Ids 0 and 1 are `<|im_end|>` and `<|im_start|>`; every byte is one more token."""

    eos_ids = (0,)

    def __init__(self):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<|im_end|>": 0, "<|im_start|>": 1}
        vocabulary |= {letter: i for i, letter in enumerate(letters, start=2)}
        self._tokenizer = Tokenizer(models.BPE(vocabulary, []))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in ("<|im_end|>", "<|im_start|>")]
        )
        self._text = {i: letter for letter, i in vocabulary.items()}

    def encode(self, text, *, add_special):
        return self._tokenizer.encode(text).ids

    def decode(self, ids):
        """Printable: a blank shows as its byte-level letter, a line break too."""
        return "".join(self._text[int(i)] for i in ids).replace("Ġ", " ").replace("Ċ", "\n")

    def render_chat(self, messages, *, add_generation_prompt):
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return "".join(turns) + "<|im_start|>assistant\n" * add_generation_prompt


@pytest.fixture(scope="session")
def tokenizer():
    return ByteTokenizer()

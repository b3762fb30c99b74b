"""Records to tokens: what is learned, and an error with its place where nothing can be."""

import numpy as np
import pytest

from lora_jax.training.examples import Example, describe_too_long, encode, split_by_length
from lora_jax.training.records import Chat, Completion, DataError, Message, Text


def shown(example, tokenizer):
    """The text with what is learned in [brackets]."""
    text = ""
    before = False
    for token, learned in zip(example.tokens, example.loss.tolist(), strict=True):
        text += "[" * (learned and not before) + "]" * (before and not learned)
        text += tokenizer.decode([token])
        before = learned
    return text + "]" * before


def chat(*turns):
    return Chat(tuple(Message(role, content) for role, content in turns), "data.jsonl:7")


def test_chat_learns_every_assistant_turn_and_its_end(tokenizer):
    record = chat(
        ("system", "short"),
        ("user", "one"),
        ("assistant", "uno"),
        ("user", "two"),
        ("assistant", "dos"),
    )
    example = encode(record, tokenizer)
    assert shown(example, tokenizer) == (
        "<|im_start|>system\nshort<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n[uno<|im_end|>]\n"
        "<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n[dos<|im_end|>]\n"
    )
    assert example.where == "data.jsonl:7"
    assert example.tokens.dtype == np.int32
    # All but the last end token and the line break after it have to be read.
    assert example.length == len(example.tokens) - 2


def test_completion_learns_the_completion(tokenizer):
    example = encode(Completion("2+2=", "4", "here"), tokenizer)
    assert shown(example, tokenizer) == "2+2=[4<|im_end|>]"


def test_text_learns_all_but_the_first_token(tokenizer):
    example = encode(Text("abc", "here"), tokenizer)
    assert shown(example, tokenizer) == "a[bc<|im_end|>]"
    assert example.length == 3


class MergingTokenizer:
    """Encodes "ab" as one token, which no boundary may merge; begins a text with 7."""

    eos_ids = (9, 8)

    def encode(self, text, *, add_special):
        return [7] * add_special + ([2] if text == "ab" else [3])

    def render_chat(self, messages, *, add_generation_prompt):
        raise ValueError("Conversation roles must alternate")


def test_prompt_and_completion_are_encoded_apart():
    example = encode(Completion("a", "b", "here"), MergingTokenizer())
    assert example.tokens.tolist() == [7, 3, 3, 9]
    assert example.loss.tolist() == [False, False, True, True]


def test_text_with_a_beginning_token_is_learned_whole():
    example = encode(Text("ab", "here"), MergingTokenizer())
    assert example.tokens.tolist() == [7, 2, 9]
    assert example.loss.tolist() == [False, True, True]


def test_text_of_a_single_token_cannot_be_learned():
    class NoSpecialTokens:
        eos_ids = ()

        def encode(self, text, *, add_special):
            return [5]

    with pytest.raises(DataError, match="here: the text has no token that could be learned"):
        encode(Text("ab", "here"), NoSpecialTokens())


def test_a_turn_without_end_token_is_learned_whole(tokenizer):
    class Template:
        eos_ids = tokenizer.eos_ids
        encode = staticmethod(tokenizer.encode)

        def render_chat(self, messages, *, add_generation_prompt):
            turns = [
                f"({m['content']})" if m["role"] == "user" else f" {m['content']};"
                for m in messages
            ]
            return "".join(turns)

    example = encode(chat(("user", "a"), ("assistant", "b")), Template())
    assert shown(example, tokenizer) == "(a)[ b;]"


def test_template_that_refuses_names_the_place():
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*refuses it: .*must alternate"):
        encode(chat(("user", "a"), ("assistant", "b")), MergingTokenizer())


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    class Forgetful:
        """Shows what was thought only in the last turn, as reasoning models' templates do."""

        eos_ids = tokenizer.eos_ids
        encode = staticmethod(tokenizer.encode)

        def render_chat(self, messages, *, add_generation_prompt):
            return "".join(
                ("<think></think>" if m is messages[-1] and m["role"] == "assistant" else "")
                + m["content"]
                for m in messages
            )

    once = encode(chat(("user", "a"), ("assistant", "b")), Forgetful())
    assert shown(once, tokenizer) == "a[<think></think>b]"
    twice = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*messages\[3\] as a continuation"):
        encode(twice, Forgetful())


@pytest.mark.parametrize(
    ("tokens", "loss", "message"),
    [
        ([1, 2, 3], [False, True], r"here: .*one shape.*\(3,\) and \(2,\)"),
        ([1, 2], [False, False], "here: a token after the first must be learned"),
        ([1, 2], [True, True], "here: .*the first cannot be"),
        ([], [], "here: a token after the first must be learned"),
    ],
)
def test_bad_example(tokens, loss, message):
    with pytest.raises(ValueError, match=message):
        Example(np.array(tokens, np.int32), np.array(loss, bool), "here")


def test_too_long_examples_are_counted_and_named(tokenizer):
    records = [Text("x" * n, f"data.jsonl:{n}") for n in (3, 8, 5, 6)]
    fitting, too_long = split_by_length([encode(r, tokenizer) for r in records], 5)
    assert [e.length for e in fitting] == [3, 5]
    assert [e.where for e in too_long] == ["data.jsonl:8", "data.jsonl:6"]
    assert describe_too_long(too_long, 5, shown=1) == (
        "2 examples longer than 5 tokens left out: data.jsonl:8 (8 tokens) and 1 more"
    )

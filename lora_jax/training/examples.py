"""Examples: the token ids of one record, and which of them are learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lora_jax.training.records import Chat, Completion, DataError, Record, Text


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids at which generation stops, the usual end of a text first; may be empty."""
        ...

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """The ids of `text`, special tokens in it recognised, those that begin a text added."""
        ...

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
    ) -> str:
        """The text of a chat, with the start of an assistant turn put after it if asked."""
        ...


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence to learn from.

    Attributes:
        tokens: token ids, int32 `[n]`.
        loss: bool `[n]`; token i is learned, as the successor of tokens 0..i-1, where true.
            `loss[0]` is false, since nothing comes before the first token.
        where: where it came from, for error messages.

    Raises:
        ValueError: the shapes differ, or no token is learned.
    """

    tokens: np.ndarray
    loss: np.ndarray
    where: str

    def __post_init__(self):
        if self.tokens.ndim != 1 or self.tokens.shape != self.loss.shape:
            raise ValueError(
                f"{self.where}: tokens and loss must have one shape [n], got {self.tokens.shape} "
                f"and {self.loss.shape}."
            )
        if not self.loss.any() or self.loss[0]:
            raise ValueError(
                f"{self.where}: a token after the first must be learned, and the first cannot be."
            )

    @property
    def length(self) -> int:
        """How many tokens the model has to read: those before the last one that is learned."""
        return int(np.flatnonzero(self.loss)[-1])


def encode(record: Record, tokenizer: Tokenizer) -> Example:
    """The example of one record.

    Of a `Chat` every assistant turn is learned, of a `Completion` the completion, of a `Text`
    everything but its first token; the latter two end with `eos_ids[0]`, learned too.

    Raises:
        DataError: the chat template cannot render the record, or not turn by turn, or the text is
            a single token; the message has the record's place.
    """
    end = list(tokenizer.eos_ids[:1])
    match record:
        case Chat():
            pieces = _chat_pieces(record, tokenizer)
        case Completion(prompt, completion):
            # Two parts encoded apart: a token across the boundary would be half given and half
            # learned, and a prompt alone, as in generation, has no such token.
            pieces = [
                (tokenizer.encode(prompt, add_special=True), False),
                (tokenizer.encode(completion, add_special=False) + end, True),
            ]
        case Text(text):
            pieces = [(tokenizer.encode(text, add_special=True) + end, True)]
    tokens = np.array([token for ids, _ in pieces for token in ids], np.int32)
    loss = np.array([learned for ids, learned in pieces for _ in ids], bool)
    loss[:1] = False
    if not loss.any():
        raise DataError(f"{record.where}: the text has no token that could be learned.")
    return Example(tokens, loss, record.where)


def _chat_pieces(chat: Chat, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The token ids of a chat in pieces, each with whether it is learned.

    A template says nothing about which characters are the assistant's. So the chat is rendered up
    to each assistant turn with the generation prompt, which is what the model sees when it answers,
    and once more through that turn; what the second adds to the first is what it must say. Each
    piece is encoded apart, so that the boundary falls between two tokens, as it does in generation.
    """
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    pieces: list[tuple[list[int], bool]] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(chat, tokenizer, messages[:turn], add_generation_prompt=True)
        after = _render(chat, tokenizer, messages[: turn + 1], add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                f"{chat.where}: the model's chat template does not render messages[{turn}] as a "
                "continuation of what comes before it, so what the assistant says cannot be told "
                "apart. Use one assistant message a line, or give prompt and completion."
            )
        given = tokenizer.encode(before[len(done) :], add_special=False)
        answer = tokenizer.encode(after[len(before) :], add_special=False)
        # Templates put a line break or the like after the end of a turn. Generation stops at the
        # end token, so the model never has to say what follows it.
        ends = [i + 1 for i, token in enumerate(answer) if token in tokenizer.eos_ids]
        end = ends[-1] if ends else len(answer)
        pieces += [(given, False), (answer[:end], True), (answer[end:], False)]
        done = after
    return pieces


def _render(
    chat: Chat,
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # A template is the model author's program: it may raise anything.
        raise DataError(f"{chat.where}: the model's chat template refuses it: {error}") from error


def split_by_length(
    examples: Sequence[Example], row_length: int
) -> tuple[list[Example], list[Example]]:
    """The examples that fit in a row of `row_length` tokens, and those that do not.

    Nothing is cut: a shortened example would teach the model to stop, or leave out the question.
    """
    fitting = [example for example in examples if example.length <= row_length]
    too_long = [example for example in examples if example.length > row_length]
    return fitting, too_long


def describe_too_long(too_long: Sequence[Example], row_length: int, *, shown: int = 5) -> str:
    """One sentence that counts the examples left out and names the first few with their lengths.

    Example:
        >>> long = Example(np.arange(9), np.arange(9) > 5, "train.jsonl:3")
        >>> describe_too_long([long], 4)
        '1 example longer than 4 tokens left out: train.jsonl:3 (8 tokens)'
    """
    named = ", ".join(f"{e.where} ({e.length} tokens)" for e in too_long[:shown])
    more = f" and {len(too_long) - shown} more" if len(too_long) > shown else ""
    plural = "" if len(too_long) == 1 else "s"
    return (
        f"{len(too_long)} example{plural} longer than {row_length} tokens left out: {named}{more}"
    )

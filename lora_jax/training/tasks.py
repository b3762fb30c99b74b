"""What is learned, as examples: the tweets, or a file that a user brings."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lora_jax.interop import assets
from lora_jax.interop.tokenizer import Tokenizer
from lora_jax.training import sentiment
from lora_jax.training.evaluation import Choices
from lora_jax.training.examples import Example, describe_too_long, encode, split_by_length
from lora_jax.training.records import Chat, Completion, DataError, Record, read_jsonl

TWEETS_HELD_OUT = 300
FILE_HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True)
class PromptForm:
    """What the prompts of a task have in common.

    Attributes:
        chat: whether they are rendered with the model's chat template.
        system: the system message of all chats, or `None`.
        suffix: what follows the user's text.
    """

    chat: bool = False
    system: str | None = None
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out example to let the model answer before and after.

    Attributes:
        prompt: token ids that are given.
        shown: what of the prompt to show.
        wanted: the answer in the data.
    """

    prompt: tuple[int, ...]
    shown: str
    wanted: str


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Examples to learn from and examples to measure on.

    Attributes:
        train: what is learned.
        held_out: what is measured on.
        samples: a few of the held-out, to be answered.
        notes: sentences on what was read and what was left out.
        form: what is put around a user's prompt, so that it looks like those that were learned.
        choices: the answers of a classification task, or `None`.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    form: PromptForm
    choices: Choices | None

    def digest(self) -> str:
        """A hash of the examples: a run can only go on with the data that it began with."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            digest.update(example.tokens.tobytes() + example.loss.tobytes())
        return digest.hexdigest()


def tweets_task(
    tokenizer: Tokenizer,
    *,
    held_out: float | None,
    seed: int,
    row_length: int,
    tokens_wanted: int,
    path: Path | None = None,
) -> Task:
    """The sentiment of tweets.

    Args:
        tokenizer: of the model.
        held_out: how many tweets, or what share of them, to hold out; `None` for 300.
        seed: of the split.
        row_length: tokens in a row; longer examples are left out.
        tokens_wanted: training tweets are taken until they have this many tokens, or all.
        path: the CSV; by default it is fetched.

    Raises:
        DataError: the file is not as expected, or all are too long.
        AssetError: the file cannot be fetched.
        ValueError: `held_out` is too large, or the answers cannot be told apart by a token.
    """
    corpus = sentiment.read_tweets(assets.tweets() if path is None else path)
    count = _count(held_out, len(corpus.tweets), default=TWEETS_HELD_OUT)
    training, held = sentiment.split(corpus.tweets, held_out=count, seed=seed)
    examples = (encode(sentiment.record(tweet), tokenizer) for tweet in training)
    train, long_train = split_by_length(list(_until(examples, tokens_wanted)), row_length)
    measured, long_held = split_by_length(
        [encode(sentiment.record(tweet), tokenizer) for tweet in held], row_length
    )
    _check_some(train, measured, row_length)
    shares = sentiment.balance(held)
    notes = [
        f"{corpus.rows:,} labelled tweets, {len(corpus.tweets):,} of them distinct; "
        f"{len(train):,} to learn from, {len(measured):,} held out "
        f"({', '.join(f'{share:.0%} {label}' for label, share in shares.items())})."
    ]
    by_place = {tweet.where: tweet for tweet in held}
    firsts = {by_place[example.where].label: example for example in reversed(measured)}
    samples = tuple(
        sample(firsts[label], tokenizer, shown=by_place[firsts[label].where].text)
        for label in sentiment.LABELS
        if label in firsts
    )
    return Task(
        train=tuple(train),
        held_out=tuple(measured),
        samples=samples,
        notes=(*notes, *_too_long(long_train + long_held, row_length)),
        form=PromptForm(suffix=sentiment.SUFFIX),
        choices=Choices(sentiment.LABELS, sentiment.answer_ids(tokenizer)),
    )


def file_task(
    path: Path,
    tokenizer: Tokenizer,
    *,
    held_out: float | None,
    seed: int,
    row_length: int,
) -> Task:
    """The records of a JSON Lines file.

    Args:
        path: the file.
        tokenizer: of the model.
        held_out: how many records, or what share of them, to hold out; `None` for a tenth.
        seed: of the split.
        row_length: tokens in a row; longer examples are left out.

    Raises:
        DataError: a line cannot be used, or all are too long, or there are too few.
    """
    records = read_jsonl(path)
    if len(records) < 2:
        raise DataError(f"{path}: expected at least 2 records, one of them held out, got 1.")
    try:
        count = _count(held_out, len(records), default=FILE_HELD_OUT)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    order = np.random.default_rng(seed).permutation(len(records))
    examples = [encode(records[index], tokenizer) for index in order]
    chosen = {example.where: records[index] for example, index in zip(examples, order, strict=True)}
    measured, long_held = split_by_length(examples[:count], row_length)
    train, long_train = split_by_length(examples[count:], row_length)
    _check_some(train, measured, row_length)
    notes = [
        f"{path}: {len(records):,} records; {len(train):,} to learn from, {len(measured):,} held "
        "out."
    ]
    return Task(
        train=tuple(train),
        held_out=tuple(measured),
        samples=tuple(
            sample(example, tokenizer, shown=_question(chosen[example.where]))
            for example in measured[:3]
        ),
        notes=(*notes, *_too_long(long_train + long_held, row_length)),
        form=PromptForm(
            chat=all(isinstance(record, Chat) for record in records),
            system=_common_system(records),
        ),
        choices=None,
    )


def sample(example: Example, tokenizer: Tokenizer, *, shown: str | None = None) -> Sample:
    """The example as a question and its answer: cut before the first learned token.

    A text that is learned whole is cut after its first quarter, at most 16 tokens.
    """
    first = int(np.argmax(example.loss))
    if first == 1:
        first = max(1, min(16, len(example.tokens) // 4))
    prompt = example.tokens[:first].tolist()
    # The first answer alone, of several.
    stop = first + int(np.argmin(np.append(example.loss[first:], False)))
    return Sample(
        prompt=tuple(prompt),
        shown=tokenizer.decode(prompt) if shown is None else shown,
        wanted=tokenizer.decode(example.tokens[first:stop]).strip(),
    )


def _count(held_out: float | None, total: int, *, default: float) -> int:
    wanted = default if held_out is None else held_out
    count = max(1, round(wanted * total)) if wanted < 1 else int(wanted)
    if count >= total:
        raise ValueError(
            f"held_out: expected less than the {total} examples that there are, got {count}. "
            "Hold out fewer, so that some are left to learn from."
        )
    return count


def _until(examples: Iterable[Example], tokens: int) -> Iterable[Example]:
    total = 0
    for example in examples:
        yield example
        total += example.length
        if total >= tokens:
            return


def _check_some(train: Sequence[Example], held: Sequence[Example], row_length: int) -> None:
    if not train or not held:
        part = "to learn from" if not train else "held out"
        raise DataError(
            f"No example {part} fits in a row of {row_length} tokens. Take a longer --row-length."
        )


def _too_long(examples: Sequence[Example], row_length: int) -> Iterable[str]:
    return [describe_too_long(examples, row_length) + "."] if examples else []


def _question(record: Record) -> str | None:
    """What of a record to show: the last user message before the first answer, or the prompt."""
    match record:
        case Chat(messages):
            asked = itertools.takewhile(lambda message: message.role != "assistant", messages)
            return [message.content for message in asked][-1]
        case Completion(prompt):
            return prompt
    return None


def _common_system(records: Sequence[Record]) -> str | None:
    systems = {
        record.messages[0].content if record.messages[0].role == "system" else None
        for record in records
        if isinstance(record, Chat)
    }
    return systems.pop() if len(systems) == 1 else None

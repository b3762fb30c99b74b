"""The task of the main job: say whether a tweet is negative, neutral or positive."""

import csv
import hashlib
import html
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_jax.training.examples import Tokenizer, encode
from lora_jax.training.records import Completion, DataError

LABELS = ("negative", "neutral", "positive")
# Put after the tweet. A chat with an instruction would be 1.6 times as long (49 tokens for 30), so
# that the same time would show the model that many fewer tweets.
SUFFIX = "\nSentiment:"

_COLUMNS = ["sentiment", "confidence", "text"]
_NOT_WORDS = frozenset(["user", "http", "rt", "via"])


@dataclass(frozen=True)
class Tweet:
    """One labelled tweet.

    Attributes:
        text: the text with handles and links masked.
        label: one of `LABELS`.
        where: file and record number of its first occurrence.
    """

    text: str
    label: str
    where: str


@dataclass(frozen=True)
class Tweets:
    """The corpus without repetitions, and what was left out of it.

    Attributes:
        tweets: one of each distinct wording, in the file's order.
        rows: how many rows the file has.
        repeated: rows left out because an earlier row has the same words and label.
        contradictory: rows left out because rows with the same words have different labels.
    """

    tweets: tuple[Tweet, ...]
    rows: int
    repeated: int
    contradictory: int


def clean(text: str) -> str:
    """`text` with @handles as `@user`, links as `http`, and debris and extra blanks removed.

    A handle names a person, who is nobody's business and no evidence. A shortened link is a dozen
    tokens of random letters, and often all in which two copies of a tweet differ.

    Example:
        >>> clean("@united  thanks &amp; bye _ http://t.co/qgqe2JoYMD")
        '@user thanks & bye http'
    """
    text = html.unescape(text)
    text = re.sub(r"https?://\S*", "http", text)
    text = re.sub(r"(?<!\w)@\w+", "@user", text)
    # A lone run of "_" is what the corpus left of an emoji.
    text = re.sub(r"(?<!\w)_+(?!\w)", " ", text)
    return " ".join(text.split())


def wording(text: str) -> str:
    """The words of a cleaned tweet: what two copies, a retweet among them, have in common.

    Example:
        >>> wording("RT @user: Our fleet's on fleek! http") == wording("our fleet's on fleek")
        True
    """
    return " ".join(w for w in re.findall(r"\w+", text.lower()) if w not in _NOT_WORDS)


def read_tweets(path: Path | str) -> Tweets:
    """Reads the CSV with the columns sentiment, confidence and text, and removes repetitions.

    Tweets are the same if `wording` is: a retweet in the held-out part of a tweet that was trained
    on would make the accuracy look better than it is. Where labels differ, no copy is kept.

    Args:
        path: the file, as `lora_jax.interop.assets.tweets()` returns it.

    Raises:
        DataError: a column, a label or a text is not as expected; with file and record number.
    """
    path = Path(path)
    # The corpus was put through two wrong encodings before it was published: it decodes as none,
    # and no byte above 127 can be mapped back to what was written. They were quotation marks and
    # emoji, so they are dropped.
    reader = csv.DictReader(io.StringIO(path.read_bytes().decode("ascii", "ignore"), newline=""))
    if reader.fieldnames != _COLUMNS:
        raise DataError(f"{path}:1: expected the columns {_COLUMNS}, got {reader.fieldnames}.")
    copies: dict[str, list[Tweet]] = {}
    rows = 0
    for rows, row in enumerate(reader, start=1):
        where = f"{path}: record {rows}"
        text, label = row["text"], row["sentiment"]
        if label not in LABELS:
            raise DataError(f"{where}: the sentiment is {label!r}; expected one of {LABELS}.")
        if text is None or not clean(text) or None in row:
            raise DataError(f"{where}: expected three fields and a text, got {list(row.values())}.")
        tweet = Tweet(clean(text), label, where)
        copies.setdefault(wording(tweet.text) or tweet.text, []).append(tweet)
    if not rows:
        raise DataError(f"{path}: the file has no record.")
    agreeing = [same for same in copies.values() if len({t.label for t in same}) == 1]
    kept = sum(map(len, agreeing))
    return Tweets(
        tweets=tuple(same[0] for same in agreeing),
        rows=rows,
        repeated=kept - len(agreeing),
        contradictory=rows - kept,
    )


def split(
    tweets: Sequence[Tweet], *, held_out: int, seed: int = 0
) -> tuple[list[Tweet], list[Tweet]]:
    """Training and held-out tweets, in an order that the texts and the seed alone decide.

    The order is that of a hash of seed and wording, so a tweet does not change sides with the order
    of the file, and one that is added or removed moves at most one other across.

    Args:
        tweets: tweets with distinct wordings, as in `Tweets.tweets`.
        held_out: how many to hold out.
        seed: chooses another split.

    Returns:
        `(training, held_out)`, both shuffled.

    Raises:
        ValueError: `held_out` is not between 1 and the number of tweets - 1.
    """
    if not 0 < held_out < len(tweets):
        raise ValueError(
            f"held_out must be between 1 and {len(tweets) - 1} for {len(tweets)} tweets, got "
            f"{held_out}."
        )

    def place(tweet: Tweet) -> bytes:
        return hashlib.sha256(f"{seed}\n{wording(tweet.text) or tweet.text}".encode()).digest()

    shuffled = sorted(tweets, key=place)
    return shuffled[held_out:], shuffled[:held_out]


def balance(tweets: Sequence[Tweet]) -> dict[str, float]:
    """The share of each label, in the order of `LABELS`.

    Example:
        >>> balance([Tweet("good", "positive", ""), Tweet("bad", "negative", "")])
        {'negative': 0.5, 'neutral': 0.0, 'positive': 0.5}
    """
    counts = Counter(tweet.label for tweet in tweets)
    return {label: counts[label] / max(len(tweets), 1) for label in LABELS}


def record(tweet: Tweet) -> Completion:
    r"""The tweet as a prompt, and its label as the completion.

    Example:
        >>> record(Tweet("so good", "positive", "tweets.csv: record 1"))
        Completion(prompt='so good\nSentiment:', completion=' positive', ...)
    """
    return Completion(tweet.text + SUFFIX, f" {tweet.label}", tweet.where)


def answer_ids(tokenizer: Tokenizer) -> np.ndarray:
    """The first token of each label as an answer, int32 `[3]` in the order of `LABELS`.

    Comparing the logits of these three, where an answer starts, classifies a tweet without
    generating.

    Raises:
        ValueError: two labels start with the same token under this tokenizer.
    """
    ids = []
    for label in LABELS:
        example = encode(record(Tweet("x", label, f"label {label}")), tokenizer)
        ids.append(example.tokens[np.argmax(example.loss)])
    if len(set(ids)) < len(LABELS):
        raise ValueError(
            f"With this tokenizer the answers {LABELS} start with the tokens {ids}, which are not "
            "distinct: the first token cannot tell them apart."
        )
    return np.array(ids, np.int32)

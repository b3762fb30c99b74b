"""The tweets: cleaning, repetitions, contradictions, the split, the answers."""

import numpy as np
import pytest

from lora_jax.training import sentiment
from lora_jax.training.examples import encode
from lora_jax.training.records import DataError
from lora_jax.training.sentiment import Tweet

HEADER = "sentiment,confidence,text\r\n"


def write(tmp_path, *rows, header=HEADER):
    path = tmp_path / "tweets.csv"
    path.write_bytes((header + "\r\n".join(rows) + "\r\n").encode("latin-1"))
    return path


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("@united you guys suck!", "@user you guys suck!"),
        (".@apple why? cc @a_b9", ".@user why? cc @user"),
        ("mail me@home.org", "mail me@home.org"),
        ("see http://t.co/aB3 https://x.y/z?q=1, now", "see http http now"),
        ("a &lt;3 &amp; b\r\r\tc", "a <3 & b c"),
        ("wow __ _ snake_case D___", "wow snake_case D___"),
    ],
)
def test_clean(text, cleaned):
    assert sentiment.clean(text) == cleaned
    assert sentiment.clean(cleaned) == cleaned


def test_repetitions_and_contradictions(tmp_path):
    path = write(
        tmp_path,
        "positive,1,@a love it http://t.co/1",
        'neutral,0.5,"first, line\r\nsecond"',
        "positive,,RT @b: @a Love it!! http://t.co/2 \xff\x81",  # the first again
        "negative,1,so so",
        "neutral,1,So so.",  # contradicts the one before
        "neutral,1,so so",
    )
    found = sentiment.read_tweets(path)
    assert [(t.text, t.label) for t in found.tweets] == [
        ("@user love it http", "positive"),
        ("first, line second", "neutral"),
    ]
    assert found.tweets[1].where == f"{path}: record 2"
    assert (found.rows, found.repeated, found.contradictory) == (6, 1, 3)
    assert sentiment.balance(found.tweets) == {"negative": 0.0, "neutral": 0.5, "positive": 0.5}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("great,1,text", "record 2: the sentiment is 'great'"),
        ("positive,1,", "record 2: expected three fields and a text"),
        ("positive,1,\xff\xfe _", "record 2: expected three fields and a text"),
        ("positive,1", "record 2: expected three fields and a text"),
        ("positive,1,a,b", "record 2: expected three fields and a text"),
    ],
)
def test_bad_record(tmp_path, row, reason):
    path = write(tmp_path, "positive,1,fine", row)
    with pytest.raises(DataError) as caught:
        sentiment.read_tweets(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


def test_bad_file(tmp_path):
    with pytest.raises(DataError, match=r"tweets\.csv:1: expected the columns"):
        sentiment.read_tweets(write(tmp_path, "a,b", header="label,text\r\n"))
    with pytest.raises(DataError, match=r"tweets\.csv: the file has no record"):
        sentiment.read_tweets(write(tmp_path))


def tweets(n):
    return [Tweet(f"tweet number {i}", sentiment.LABELS[i % 3], str(i)) for i in range(n)]


def test_split_is_decided_by_the_texts_alone():
    training, held_out = sentiment.split(tweets(300), held_out=60)
    assert len(held_out) == 60
    assert sorted([*training, *held_out], key=lambda t: int(t.where)) == tweets(300)
    assert sentiment.split(tweets(300)[::-1], held_out=60) == (training, held_out)
    _, other = sentiment.split(tweets(300), held_out=60, seed=1)
    assert set(other) != set(held_out)
    # One tweet less: at most one other changes sides.
    _, without = sentiment.split([t for t in tweets(300) if t != held_out[0]], held_out=60)
    assert set(without) >= set(held_out[1:])
    # The order is shuffled: not the file's.
    assert [t.where for t in held_out] != sorted((t.where for t in held_out), key=int)


@pytest.mark.parametrize("held_out", [0, 10, 11])
def test_split_leaves_both_parts_something(held_out):
    with pytest.raises(ValueError, match="held_out must be between 1 and 9 for 10 tweets"):
        sentiment.split(tweets(10), held_out=held_out)


def test_the_label_is_what_is_learned(tokenizer):
    example = encode(sentiment.record(Tweet("so good", "positive", "here")), tokenizer)
    assert tokenizer.decode(example.tokens) == "so good\nSentiment: positive<|im_end|>"
    assert tokenizer.decode(example.tokens[example.loss]) == " positive<|im_end|>"


def test_answer_ids(tokenizer):
    # The byte tokenizer cannot tell "negative" from "neutral" by one token.
    with pytest.raises(ValueError, match="not distinct"):
        sentiment.answer_ids(tokenizer)

    class Words:
        eos_ids = (0,)

        def encode(self, text, *, add_special):
            label = text.removeprefix(" ")
            return [40 + sentiment.LABELS.index(label)] if label != text else [1, 2, 3]

    assert np.array_equal(sentiment.answer_ids(Words()), [40, 41, 42])

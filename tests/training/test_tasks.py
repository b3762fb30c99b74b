"""The tweets as a task: what is learned, held out, shown, and compared."""

import numpy as np
import pytest

from lora_jax.training import sentiment
from lora_jax.training.records import DataError
from lora_jax.training.tasks import tweets_task


class Labels:
    """The byte-level tokenizer, with one more token for each label as an answer."""

    eos_ids = (0,)

    def __init__(self, tokenizer):
        self._bytes = tokenizer

    def encode(self, text, *, add_special):
        label = text.removeprefix(" ")
        if label in sentiment.LABELS:
            return [1000 + sentiment.LABELS.index(label)]
        return self._bytes.encode(text, add_special=add_special)

    def decode(self, ids):
        return "".join(
            f" {sentiment.LABELS[int(i) - 1000]}" if i >= 1000 else self._bytes.decode([i])
            for i in ids
            if i  # As the real one, which leaves special tokens out.
        )

    def render_chat(self, messages, *, add_generation_prompt):
        raise AssertionError("the tweets are no chat")


@pytest.fixture
def path(tmp_path):
    rows = [f"{sentiment.LABELS[i % 3]},1,tweet number {'x' * (i // 3)} {i}" for i in range(30)]
    path = tmp_path / "tweets.csv"
    path.write_text("sentiment,confidence,text\n" + "\n".join(rows) + "\n")
    return path


def make(path, tokenizer, **options):
    settings = {"held_out": 6, "seed": 0, "row_length": 64, "tokens_wanted": 10**6}
    return tweets_task(Labels(tokenizer), path=path, **(settings | options))


def text(example, tokenizer):
    return Labels(tokenizer).decode(example.tokens)


def test_every_tweet_is_either_learned_or_held_out(path, tokenizer):
    task = make(path, tokenizer)
    learned, held = ({e.where for e in part} for part in (task.train, task.held_out))
    assert (len(learned), len(held)) == (24, 6)
    assert not learned & held


def test_only_the_label_is_learned(path, tokenizer):
    for example in make(path, tokenizer).train:
        said = text(example, tokenizer)
        learned = example.tokens[example.loss]
        assert learned[0] >= 1000
        assert said.count("\nSentiment:") == 1
        number = int(said.split("\n")[0].split()[-1])
        assert learned[0] == 1000 + number % 3


def test_samples_show_one_tweet_of_each_label(path, tokenizer):
    task = make(path, tokenizer, held_out=12)
    assert [sample.wanted for sample in task.samples] == list(sentiment.LABELS)
    for sample in task.samples:
        assert sample.shown.startswith("tweet number")
        assert Labels(tokenizer).decode(sample.prompt) == sample.shown + sentiment.SUFFIX
    assert task.form.suffix == sentiment.SUFFIX
    assert np.array_equal(task.choices.ids, [1000, 1001, 1002])


def test_the_seed_chooses_and_is_reproducible(path, tokenizer):
    assert make(path, tokenizer).digest() == make(path, tokenizer).digest()
    assert make(path, tokenizer).digest() != make(path, tokenizer, seed=1).digest()


def test_no_more_is_read_than_wanted(path, tokenizer):
    task = make(path, tokenizer, tokens_wanted=100)
    lengths = [example.length for example in task.train]
    assert sum(lengths) >= 100 > sum(lengths[:-1])


def test_too_long_tweets_are_counted(path, tokenizer):
    task = make(path, tokenizer, row_length=34)
    left_out = 30 - len(task.train) - len(task.held_out)
    assert left_out > 0
    assert any(str(left_out) in note and "34" in note for note in task.notes)
    with pytest.raises(DataError, match="fits in a row of 5 tokens"):
        make(path, tokenizer, row_length=5)


def test_holding_out_all_is_refused(path, tokenizer):
    with pytest.raises(ValueError, match="less than the 30 examples"):
        make(path, tokenizer, held_out=30)

"""Evaluation of packed batches against one example at a time, in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.training.evaluation import Choices, make_evaluate
from lora_jax.training.examples import Example

CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, tied_head=True, scan_layers=True,
)  # fmt: skip
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * RNG.normal(size=leaf.shape) + (leaf.ndim < 2), leaf.dtype),
    decoder.abstract_params(CONFIG),
)
APPLY = functools.partial(decoder.apply, CONFIG)
CHOICES = Choices(("no", "maybe", "yes"), np.array([7, 3, 30], np.int32))


def examples():
    """Prompts of 3 to 9 tokens, then an answer that begins with a choice and has two tokens."""
    made = []
    for number in range(11):
        prompt = RNG.integers(0, 40, RNG.integers(3, 10))
        tokens = np.array([*prompt, CHOICES.ids[number % 3], 1], np.int32)
        made.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), f"here:{number}"))
    return made


EXAMPLES = examples()


@pytest.fixture(scope="module")
def adapter():
    config = lora.LoraConfig(rank=2)
    made = lora.init(jax.random.key(0), config, APPLY, PARAMS, np.zeros((1, 2), np.int32))
    return jax.tree.map(lambda leaf: leaf + 0.1, made)


def by_hand(adapter, choices):
    """Mean loss by token, and the share of right answers, with the merged model."""
    merged, losses, hits = lora.merge(PARAMS, adapter), [], []
    for example in EXAMPLES:
        logits = np.asarray(APPLY(merged, example.tokens[None]), np.float64)[0]
        learned = np.flatnonzero(example.loss)
        for place in learned:
            row = logits[place - 1]
            losses.append(np.log(np.exp(row).sum()) - row[example.tokens[place]])
            if choices is None:
                hits.append(row.argmax() == example.tokens[place])
        if choices is not None:
            row = logits[learned[0] - 1][choices.ids]
            hits.append(choices.ids[row.argmax()] == example.tokens[learned[0]])
    return np.mean(losses), np.mean(hits)


@pytest.mark.parametrize("choices", [None, CHOICES], ids=["tokens", "choices"])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_agrees_with_one_example_at_a_time(adapter, choices, rows):
    evaluate = make_evaluate(lora.lift(APPLY), EXAMPLES, row_length=24, rows=rows, choices=choices)
    got = evaluate(adapter, PARAMS)
    loss, accuracy = by_hand(adapter, choices)
    assert got.loss == pytest.approx(loss, rel=1e-4)
    assert got.accuracy == pytest.approx(accuracy)
    assert (got.examples, got.tokens) == (11, 22)


def test_an_answer_that_is_no_choice_is_an_error():
    odd = Example(np.array([1, 2, 9], np.int32), np.array([False, False, True]), "there:5")
    with pytest.raises(
        ValueError, match=r"there:5: expected an answer .*\(no, maybe, yes\), got 9"
    ):
        make_evaluate(APPLY, [*EXAMPLES, odd], row_length=24, rows=1, choices=CHOICES)

"""Packing: nothing lost, nothing twice, nothing across examples; the same batches after a stop."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.training.batching import (
    evaluation_batches,
    fill,
    first_predictions,
    select_size,
    training_batches,
)
from lora_jax.training.examples import Example

LENGTH = 16


@st.composite
def example_lists(draw):
    """Lists of examples with distinct tokens everywhere, so that each token names its origin."""
    examples, next_token = [], 1
    for i in range(draw(st.integers(1, 12))):
        loss = draw(st.lists(st.booleans(), min_size=1, max_size=LENGTH))
        loss = np.array([False, *loss])
        if not loss.any():
            loss[-1] = True
        tokens = np.arange(next_token, next_token + len(loss), dtype=np.int32)
        next_token += len(loss)
        examples.append(Example(tokens, loss, f"example {i}"))
    return examples


def unpack(batches):
    """Every example found in the batches, as (tokens read, {position: target}, index)."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            segments = batch.segment_ids[row]
            assert np.all(batch.tokens[row][segments == 0] == 0)
            owners = segments[batch.select[row]]
            for segment in range(1, segments.max() + 1):
                (places,) = np.nonzero(segments == segment)
                start, stop = places[0], places[-1] + 1
                assert np.array_equal(places, np.arange(start, stop))
                assert np.array_equal(batch.positions[row, start:stop], np.arange(stop - start))
                mine = (owners == segment) & (batch.select_weights[row] == 1)
                (index,) = np.unique(batch.select_examples[row][mine])
                positions = batch.select[row][mine] - start
                targets = dict(
                    zip(positions.tolist(), batch.select_targets[row][mine].tolist(), strict=True)
                )
                assert len(targets) == mine.sum()
                found.append((batch.tokens[row, start:stop].tolist(), targets, int(index)))
            padding = batch.select_weights[row] == 0
            assert np.all(batch.select_examples[row][padding] == -1)
            assert set(np.unique(batch.select_weights[row])) <= {0, 1}
    return found


def expected(examples):
    """The same from the definition: read all before the last learned token, learn where `loss`."""
    return [
        (
            e.tokens[: e.length].tolist(),
            {int(i) - 1: int(e.tokens[i]) for i in np.flatnonzero(e.loss)},
            index,
        )
        for index, e in enumerate(examples)
    ]


def key(found):
    return found[2]


@given(example_lists(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_evaluation_has_every_example_exactly_once(examples, rows):
    batches = evaluation_batches(examples, row_length=LENGTH, rows=rows)
    assert sorted(unpack(batches), key=key) == expected(examples)
    shapes = {jax.tree.map(lambda x: (x.shape, x.dtype.name), batch) for batch in batches}
    assert len(shapes) == 1
    assert batches[0].tokens.shape == (rows, LENGTH)
    # No more batches than are needed if every row takes what fits.
    assert len(batches) <= -(-len(examples) // rows)


@given(example_lists(), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_training_has_every_example_once_an_epoch(examples, rows, seed):
    batches = training_batches(examples, row_length=LENGTH, rows=rows, seed=seed, epochs=2)
    batches = list(batches)
    assert sorted(unpack(batches), key=key) == sorted(expected(examples) * 2, key=key)
    assert len({jax.tree.map(np.shape, batch) for batch in batches}) == 1


@given(example_lists())
@settings(max_examples=25, deadline=None)
def test_first_predictions(examples):
    for batch in evaluation_batches(examples, row_length=LENGTH, rows=2):
        indices, flat = first_predictions(batch)
        assert indices.tolist() == sorted(set(batch.select_examples.ravel().tolist()) - {-1})
        first_learned = [e.tokens[np.argmax(e.loss)] for e in examples]
        assert batch.select_targets.reshape(-1)[flat].tolist() == [
            first_learned[i] for i in indices
        ]


def many(n=600):
    rng = np.random.default_rng(0)
    examples = []
    for i, size in enumerate(rng.integers(10, 60, n)):
        loss = np.zeros(size, bool)
        loss[-2:] = True
        examples.append(Example(np.full(size, i, np.int32), loss, str(i)))
    return examples


def order(batches):
    return [b.select_examples[b.select_examples >= 0].tolist() for b in batches]


@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_state_round_trip_through_json(stop):
    def batches():
        return training_batches(many(), row_length=128, rows=2, seed=3)

    uninterrupted = batches()
    for _ in range(stop):
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    following = [next(uninterrupted) for _ in range(150)]  # into the second epoch
    resumed = batches()
    resumed.set_state(state)
    for batch in following:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)


def test_seed_and_epoch_change_the_order():
    def first(seed):
        return order(training_batches(many(), row_length=128, rows=2, seed=seed, epochs=1))

    assert first(0) == first(0)
    assert first(0) != first(1)
    both = order(training_batches(many(), row_length=128, rows=2, seed=0, epochs=2))
    flat = [i for batch in both for i in batch]
    assert flat[:100] != flat[len(flat) // 2 : len(flat) // 2 + 100]


def test_a_small_set_is_seen_evenly():
    batches = training_batches(many(12), row_length=128, rows=1, seed=0)
    seen = np.zeros(12, int)
    while seen.sum() < 120:
        for index in np.unique(next(batches).select_examples):
            seen[index] += index >= 0
    # 10 times each on average; rows that straddle two epochs allow for a little more or less.
    assert seen.min() >= 8
    assert seen.max() <= 12


def test_rows_are_more_than_nine_tenths_full():
    batches = list(training_batches(many(), row_length=128, rows=4, epochs=1))
    assert np.mean([fill(b) for b in batches[:-1]]) > 0.9
    # Best fit of decreasing lengths needs hardly more rows than there are tokens for.
    used = sum(
        int((b.segment_ids[:, 0] > 0).sum())
        for b in evaluation_batches(many(), row_length=128, rows=4)
    )
    assert used <= 1.02 * sum(e.length for e in many()) / 128 + 1


def test_empty_rows_carry_no_loss():
    example = Example(np.array([5, 6, 7], np.int32), np.array([False, False, True]), "only")
    (batch,) = evaluation_batches([example], row_length=4, rows=3)
    assert batch.tokens.tolist() == [[5, 6, 0, 0], [0] * 4, [0] * 4]
    assert batch.segment_ids.tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4]
    assert batch.select_weights.sum() == 1
    assert (batch.select[0, 0], batch.select_targets[0, 0]) == (1, 7)
    assert fill(batch) == pytest.approx(2 / 12)


def test_select_size():
    few = [Example(np.arange(17), np.arange(17) >= 15, "")] * 3  # 2 of 16 tokens read
    assert select_size(few, 128) == 24  # 1.5 x 2 x 8
    whole = [Example(np.arange(17), np.arange(17) >= 1, "")]
    assert select_size(whole, 128) == 128
    one_large = [*few, Example(np.arange(101), np.arange(101) >= 1, "")]
    assert select_size(one_large, 128) == 128
    assert select_size(one_large, 1024) == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"row_length": 0}, "row_length and rows must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"examples": []}, "no examples"),
        ({"row_length": 8}, r"0: \d+ tokens do not fit in a row of 8"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"examples": many(3), "row_length": 128, "rows": 2} | change
    with pytest.raises(ValueError, match=message):
        training_batches(arguments.pop("examples"), **arguments)

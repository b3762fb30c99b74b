"""The loop with a toy model: what it reports, saves and does when things go wrong."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.training import loop
from lora_jax.training.batching import training_batches
from lora_jax.training.evaluation import Evaluation
from lora_jax.training.examples import Example
from lora_jax.training.step import init_state, make_step

RATES = optax.linear_schedule(0.1, 0.0, 12)
TX = optax.adam(RATES)
OFFLOADED = lora.offload(TX)


def example(number, *, poison=False):
    tokens = np.random.default_rng(number).integers(1, 9, 6).astype(np.int32)
    tokens[-1] = 999 if poison else tokens[-1]
    return Example(tokens, np.arange(6) >= 4, f"train.jsonl:{number + 1}")


GOOD = [example(number) for number in range(40)]


def loss_fn(adapter, params, batch, key):
    """Token t should be valued at t / 10; the value of the poison is not a number."""
    targets = jnp.where(batch.select_targets == 999, jnp.nan, batch.select_targets / 10)
    noise = 0.01 * jax.random.normal(key, targets.shape)
    values = adapter["a"][batch.select_targets % 9] + params
    return jnp.sum(batch.select_weights * (values - targets + noise) ** 2), jnp.sum(
        batch.select_weights
    )


class Recorder:
    """Keeps what the loop tells, with copies of what it saves."""

    def __init__(self, on_step=lambda entry: None):
        self.entries, self.evaluations, self.saved, self.steps = [], [], [], []
        self._on_step = on_step

    def stepped(self, entry):
        self.entries.append({k: v for k, v in entry.items() if k != "seconds"})
        assert entry["seconds"] >= 0
        self._on_step(entry)

    def evaluated(self, step, evaluation):
        self.evaluations.append((step, evaluation.loss))

    def save(self, step, state, place, evaluation):
        plain = dataclasses.replace(state, key=jax.random.key_data(state.key))
        self.saved.append((jax.device_get(plain), place))
        self.steps.append((step, None if evaluation is None else evaluation.loss))


def batches(examples=GOOD, place=None):
    iterator = training_batches(examples, row_length=16, rows=2, seed=4)
    if place is not None:
        iterator.set_state(place)
    return iterator


def start(tx=TX):
    return init_state({"a": jnp.zeros(9)}, tx, jax.random.key(5))


def never():
    return None


def run(
    state, recorder, *, steps=12, data=None, evaluate_at=(), examples=GOOD, tx=TX, save_every=99,
    stop=never,
):  # fmt: skip
    return loop.run(
        state,
        jnp.float32(0.5),
        step=make_step(loss_fn, tx, max_grad_norm=1.0),
        batches=batches(examples) if data is None else data,
        steps=steps,
        learning_rate=RATES,
        evaluate=lambda adapter, params: Evaluation(float(adapter["a"].sum()), 0.5, 3, 3),
        evaluate_at=frozenset(evaluate_at),
        save_every=save_every,
        stop=stop,
        events=recorder,
        where=lambda index: examples[index].where,
    )


def revived(plain):
    state = jax.tree.map(jnp.array, plain)
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


def test_it_reports_every_step_as_a_plain_loop_computes_it():
    recorder = Recorder()
    final = run(start(), recorder)
    state, data, step = start(), batches(), jax.jit(make_step(loss_fn, TX, max_grad_norm=1.0))
    assert [entry["step"] for entry in recorder.entries] == list(range(1, 13))
    for number, entry in enumerate(recorder.entries):
        batch = next(data)
        state, metrics = step(state, jnp.float32(0.5), batch)
        assert entry["loss"] == pytest.approx(float(metrics.loss), rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(float(metrics.grad_norm), rel=1e-5)
        assert entry["learning_rate"] == pytest.approx(0.1 * (1 - number / 12), rel=1e-5)
        assert entry["tokens"] == (batch.segment_ids > 0).sum()
        assert entry["learned_tokens"] == batch.select_weights.sum()
    np.testing.assert_allclose(final.adapter["a"], state.adapter["a"], rtol=1e-5, atol=1e-7)
    assert recorder.entries[-1]["loss"] < recorder.entries[0]["loss"]
    assert len(recorder.saved) == 1


def test_it_trains_alike_with_the_state_in_host_memory():
    plain, offloaded = Recorder(), Recorder()
    wanted = run(start(), plain, evaluate_at=(5,))
    final = run(start(OFFLOADED), offloaded, evaluate_at=(5,), tx=OFFLOADED)
    assert offloaded.entries == plain.entries
    for (one, place), (two, other) in zip(offloaded.saved, plain.saved, strict=True):
        assert_same(one, two)
        assert place == other
    assert_same((final.adapter, final.opt_state), (wanted.adapter, wanted.opt_state))
    assert final.opt_state[0].mu["a"].sharding.memory_kind == "pinned_host"


def test_it_evaluates_and_saves_at_the_given_steps():
    recorder = Recorder()
    run(start(), recorder, evaluate_at=(4, 9))
    assert [int(state.step) for state, _ in recorder.saved] == [4, 9, 12]
    assert [step for step, _ in recorder.evaluations] == [4, 9]
    losses = [loss for _, loss in recorder.evaluations]
    assert recorder.steps == [(4, losses[0]), (9, losses[1]), (12, None)]
    for loss, (state, _) in zip(losses, recorder.saved, strict=False):
        assert loss == pytest.approx(state.adapter["a"].sum(), rel=1e-6)


def test_it_saves_every_so_many_steps_counted_from_the_start_of_the_run():
    whole, part = Recorder(), Recorder()
    run(start(), whole, save_every=5, evaluate_at=(7,))
    assert [step for step, _ in whole.steps] == [5, 7, 10, 12]
    plain, place = whole.saved[1]
    run(revived(plain), part, data=batches(place=place), save_every=5)
    assert [step for step, _ in part.steps] == [10, 12]
    for (one, there), (two, here) in zip(part.saved, whole.saved[2:], strict=True):
        assert_same(one, two)
        assert there == here


def test_going_on_from_a_save_is_the_run_that_was_not_interrupted():
    whole, part, rest = Recorder(), Recorder(), Recorder()
    final = run(start(), whole)
    run(start(), part, evaluate_at=(5,), steps=12)
    plain, place = part.saved[0]
    resumed = run(revived(plain), rest, data=batches(place=place))
    assert rest.entries == whole.entries[5:]
    assert_same(resumed.adapter, final.adapter)
    assert_same(resumed.opt_state, final.opt_state)


@pytest.mark.parametrize("tx", [TX, OFFLOADED], ids=["device", "host"])
def test_a_loss_that_is_not_finite_stops_it_and_keeps_the_last_good_state(tx):
    examples = [*GOOD[:17], example(17, poison=True), *GOOD[18:]]
    data, step = batches(examples), 0
    while True:
        step += 1
        if 17 in next(data).select_examples:
            break
    assert 2 < step < 11  # or the test would show little
    recorder, reference = Recorder(), Recorder()
    with pytest.raises(loop.NonFiniteLoss) as caught:
        run(start(tx), recorder, examples=examples, tx=tx)
    assert str(caught.value).startswith(f"step {step}: the loss is nan")
    assert "train.jsonl:18" in str(caught.value)
    run(start(), reference, examples=examples, evaluate_at=(step - 1,), steps=step - 1)
    (plain, place), (wanted, wanted_place) = recorder.saved[-1], reference.saved[-1]
    assert int(plain.step) == step - 1
    assert_same(plain, wanted)
    # Going on means trying the same batch again.
    assert place == wanted_place
    assert [entry["step"] for entry in recorder.entries] == list(range(1, step + 1))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(signum):
    def interrupt(entry):
        if entry["step"] == 3:
            os.kill(os.getpid(), signum)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    recorder, rest, whole = Recorder(interrupt), Recorder(), Recorder()
    with loop.interruptible() as stop, pytest.raises(loop.Interrupted) as caught:
        run(start(), recorder, stop=stop)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    plain, place = recorder.saved[-1]
    assert caught.value.step == int(plain.step) == len(recorder.entries)
    assert caught.value.signal == signum
    assert 3 <= caught.value.step <= 5
    run(revived(plain), rest, data=batches(place=place))
    run(start(), whole)
    assert recorder.entries + rest.entries == whole.entries


def test_it_asks_once_a_step_whether_to_stop():
    """So that several processes can agree in what is asked."""
    asked = iter([None] * 5 + [signal.SIGTERM])
    recorder = Recorder()
    with pytest.raises(loop.Interrupted):
        run(start(), recorder, stop=lambda: next(asked), evaluate_at=(2,), save_every=3)
    assert [step for step, _ in recorder.steps] == [2, 3, 6]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_not_held_back(first):
    terminated = []
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    try:
        with loop.interruptible() as stop:
            assert stop() is None
            signal.raise_signal(first)
            assert stop() == first
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert terminated
            assert stop() == first
    finally:
        signal.signal(signal.SIGTERM, before)


def test_data_that_ends_too_early_is_an_error():
    data = training_batches(GOOD[:4], row_length=16, rows=2, epochs=1)
    with pytest.raises(ValueError, match=r"data ended after \d steps; expected enough for 12"):
        run(start(), Recorder(), data=data)


def test_the_base_is_not_donated():
    params = jnp.float32(0.5)
    loop.run(
        start(), params, step=make_step(loss_fn, TX), batches=batches(), steps=2,
        learning_rate=RATES, evaluate=None, evaluate_at=frozenset(), save_every=9, stop=never,
        events=Recorder(), where=str,
    )  # fmt: skip
    assert not params.is_deleted()

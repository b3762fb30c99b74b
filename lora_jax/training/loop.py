"""The loop around the step: evaluates, logs, saves, and stops in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.training.batching import Batch
from lora_jax.training.evaluation import Evaluation
from lora_jax.training.step import Metrics, TrainState

Step = Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, Metrics]]


class NonFiniteLoss(ArithmeticError):
    """Loss or gradient stopped being a finite number.

    Attributes:
        step: which step it was, counted from 1; its update was not made.
    """

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


class Interrupted(Exception):
    """Ctrl-C, or notice that the machine is taken away; what there was is saved.

    Attributes:
        step: how many updates were made.
        signal: SIGINT or SIGTERM.
    """

    def __init__(self, step: int, signal: signal.Signals):
        super().__init__(f"{signal.name} after step {step}")
        self.step = step
        self.signal = signal


class Batches(Protocol):
    """An iterator over batches that can say where it is."""

    def __next__(self) -> Batch:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Where it is, as JSON values."""
        ...


class Events(Protocol):
    """What the loop tells, and to whom is the caller's choice."""

    def stepped(self, entry: dict[str, Any]) -> None:
        """After each step: its number, loss, learning rate, gradient norm, tokens and seconds."""
        ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """After each evaluation."""
        ...

    def save(
        self, step: int, state: TrainState, place: dict[str, Any], evaluation: Evaluation | None
    ) -> None:
        """Where the state should be saved; `place` is that of the batches.

        The state is donated to the next step as soon as this returns.
        """
        ...


class _Pending(NamedTuple):
    """A step that was dispatched and not yet looked at."""

    step: int
    metrics: Metrics
    batch: Batch
    place: dict[str, Any]


def run(
    state: TrainState,
    params: Any,
    *,
    step: Step,
    batches: Batches,
    steps: int,
    learning_rate: Callable[[int], Any],
    evaluate: Callable[[Any, Any], Evaluation],
    evaluate_at: frozenset[int],
    save_every: int,
    stop: Callable[[], signal.Signals | None],
    events: Events,
    where: Callable[[int], str],
    spread: Callable[[Batch], Any] = lambda batch: batch,
) -> TrainState:
    """Trains until `steps` updates are made.

    The numbers of a step are fetched while the device works on the next, which was dispatched
    before. When it is to stop, the steps under way are finished and saved.

    Args:
        state: where to start; its buffers are donated. `state.step` says how many updates are done.
        params: the frozen parameters, never donated.
        step: from `make_step`, not compiled.
        batches: the data, at the place that belongs to `state`.
        steps: number of updates in the whole run.
        learning_rate: of each update, for the log.
        evaluate: `(adapter, params) -> Evaluation`.
        evaluate_at: numbers of updates after which to evaluate, and then save. Those up to
            `state.step` are passed over.
        save_every: after every so many updates it is saved, too.
        stop: asked once after each step: the signal because of which to stop, or None. With several
            processes it must say the same in all of them.
        events: told of each step and evaluation, and asked to save.
        where: the place of a training example by its index, for the error about a bad batch.
        spread: puts a batch where the step wants it.

    Returns:
        The state after the last update, saved.

    Raises:
        NonFiniteLoss: a loss or gradient was not finite. The last good state has been saved.
        Interrupted: `stop` said so. The state has been saved.
        ValueError: the batches end too early.
    """
    # What came in its place comes back there.
    places = jax.tree.map(lambda leaf: leaf.sharding, state) if state.step.committed else None
    advance = jax.jit(step, donate_argnums=0, out_shardings=(places, None))

    def finish(pending: _Pending | None) -> None:
        """Waits for a step and reports it."""
        nonlocal last
        if pending is None:
            return
        metrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        entry = {
            "kind": "train",
            "step": pending.step,
            "loss": float(metrics.loss),
            "learning_rate": float(rates[pending.step - 1 - first]),
            "grad_norm": float(metrics.grad_norm),
            "tokens": int((pending.batch.segment_ids > 0).sum()),
            "learned_tokens": int((pending.batch.select_weights != 0).sum()),
            "seconds": round(now - last, 4),
        }
        last = now
        events.stepped(entry)
        if not metrics.finite:
            events.save(pending.step - 1, state, pending.place, None)
            raise NonFiniteLoss(_describe(entry, pending.batch, where), step=pending.step)

    first = int(state.step)
    rates = np.asarray([learning_rate(number) for number in range(first, steps)])
    finite = jnp.ones((), bool, device=state.step.sharding if state.step.committed else None)
    pending: _Pending | None = None
    place = batches.get_state()
    last = time.perf_counter()
    for number in range(first + 1, steps + 1):
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(
                f"The data ended after {number - 1} steps; expected enough for {steps}."
            ) from None
        state, metrics = advance(state, params, spread(batch), finite)
        # Once a step fails, the one dispatched behind it must not change the state either.
        finite = metrics.finite
        finish(pending)
        pending = _Pending(number, metrics, batch, place)
        place = batches.get_state()
        reason, evaluates = stop(), number in evaluate_at
        if reason or evaluates or number == steps or number % save_every == 0:
            finish(pending)
            pending = None
            evaluation = None
            if evaluates:
                evaluation = evaluate(state.adapter, params)
                events.evaluated(number, evaluation)
            events.save(number, state, place, evaluation)
            last = time.perf_counter()
        if reason:
            raise Interrupted(number, reason)
    return state


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], signal.Signals | None]]:
    """Holds back the first Ctrl-C or SIGTERM; what comes after it acts as always.

    Yields:
        A function that says which signal came, or None.
    """
    came: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Only the main thread may set handlers, and only it gets signals.
        return

    def handle(signum: int, frame: Any) -> None:
        came.append(signal.Signals(signum))
        restore()

    def restore() -> None:
        for number, handler in before.items():
            # None: it was not set from Python, as by JAX where several processes run.
            signal.signal(number, handler or signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: came[0] if came else None
    finally:
        restore()


def _describe(entry: dict[str, Any], batch: Batch, where: Callable[[int], str]) -> str:
    used = [int(index) for index in np.unique(batch.select_examples) if index >= 0]
    named = ", ".join(where(index) for index in used[:8])
    more = f" and {len(used) - 8} more" if len(used) > 8 else ""
    return (
        f"step {entry['step']}: the loss is {entry['loss']} and the gradient's norm "
        f"{entry['grad_norm']} at a learning rate of {entry['learning_rate']:.3g}; expected finite "
        f"numbers. This step's update was not made. Its examples: {named}{more}."
    )

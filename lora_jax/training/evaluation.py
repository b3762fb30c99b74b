"""How well a model does on examples that it does not learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.models.partition import hold
from lora_jax.training.batching import Batch, evaluation_batches, first_predictions
from lora_jax.training.examples import Example
from lora_jax.training.mesh import spread
from lora_jax.training.objective import select_logits, token_losses
from lora_jax.tree import combine


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Averages over examples.

    Attributes:
        loss: mean cross-entropy of a learned token, in nats.
        accuracy: share of the examples whose answer is right, or, where there is no fixed set of
            answers, of the learned tokens that the model finds likeliest.
        examples: how many examples.
        tokens: how many learned tokens.
    """

    loss: float
    accuracy: float
    examples: int
    tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """A classification task: each example's answer is one of C, told by its first token.

    Attributes:
        names: what the answers are called, C of them.
        ids: int32 `[C]`, their first tokens, all different.
    """

    names: tuple[str, ...]
    ids: np.ndarray


def make_evaluate(
    apply: Callable[..., Any],
    examples: Sequence[Example],
    *,
    row_length: int,
    rows: int,
    choices: Choices | None = None,
    mesh: Mesh | None = None,
) -> Callable[[Any, Any], Evaluation]:
    """Makes a function that measures an adapter; compiled once, on its first call.

    Args:
        apply: `lift(decoder.apply)` without its config.
        examples: what to measure on.
        row_length: L, tokens in a row.
        rows: R, rows in a batch.
        choices: the answers to compare, for accuracy by example; `None` for accuracy by token.
        mesh: the devices that the rows are split over, if several.

    Returns:
        `evaluate(adapter, params) -> Evaluation`.

    Raises:
        ValueError: as in `evaluation_batches`, or the answer of an example is none of `choices`.
    """
    batches = evaluation_batches(examples, row_length=row_length, rows=rows)
    if choices is not None:
        _check_answers(examples, choices)

    @jax.jit
    def measure(adapter: Any, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = select_logits(apply, combine(params, adapter), batch)
        if choices is None:
            guesses = jnp.argmax(logits, axis=-1)
        else:
            guesses = jnp.asarray(choices.ids)[jnp.argmax(logits[..., choices.ids], axis=-1)]
        # On a mesh, whole on every device, since every host reads them.
        return token_losses(logits, batch).sum(), hold(guesses == batch.select_targets)

    def evaluate(adapter: Any, params: Any) -> Evaluation:
        # All batches are dispatched before the first result is waited for.
        results = [measure(adapter, params, spread(batch, mesh)) for batch in batches]
        loss = right = asked = tokens = 0.0
        for batch, (total, hits) in zip(batches, results, strict=True):
            flat, weights = np.asarray(hits).reshape(-1), batch.select_weights.reshape(-1)
            counted = np.flatnonzero(weights) if choices is None else first_predictions(batch)[1]
            right += float(flat[counted].sum())
            asked += len(counted)
            loss += float(total)
            tokens += float(weights.sum())
        return Evaluation(loss / tokens, right / asked, len(examples), int(tokens))

    return evaluate


def _check_answers(examples: Sequence[Example], choices: Choices) -> None:
    for example in examples:
        first = int(example.tokens[np.argmax(example.loss)])
        if first not in choices.ids:
            raise ValueError(
                f"{example.where}: expected an answer that starts with one of the tokens "
                f"{choices.ids.tolist()} ({', '.join(choices.names)}), got {first}."
            )

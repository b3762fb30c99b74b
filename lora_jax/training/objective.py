"""What a language model learns: the next token, where a batch says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.training.batching import Batch
from lora_jax.training.step import LossFn
from lora_jax.tree import combine


def select_logits(apply: Callable[..., Any], params: Any, batch: Batch) -> jax.Array:
    """Logits at the batch's learned positions only, float32 `[R, K, V]`.

    Args:
        apply: `decoder.apply` without its config, lifted if `params` holds virtual weights.
        params: what it takes.
        batch: R rows with K learned positions each.
    """
    return apply(
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        select=batch.select,
    )


def token_losses(logits: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy in nats of each next token, float32 `[R, K]`, 0 where the weight is 0."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.select_targets)
    return losses * batch.select_weights


def next_token_loss(apply: Callable[..., Any], *, dropout: bool = False) -> LossFn:
    """The loss function that `make_step` wants, for a decoder.

    Args:
        apply: `lift(decoder.apply)` without its config.
        dropout: whether adapter dropout is on.

    Returns:
        `(adapter, params, batch, key) -> (sum of the losses in nats, number of tokens learned)`.
    """

    def loss_fn(adapter: Any, params: Any, batch: Batch, key: jax.Array):
        adapted = combine(params, adapter, dropout_key=key if dropout else None)
        losses = token_losses(select_logits(apply, adapted, batch), batch)
        return losses.sum(), jnp.sum(batch.select_weights)

    return loss_fn

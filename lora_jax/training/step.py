"""One training step: gradients for the adapter alone, accumulated, clipped, applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lora_jax.optim import conditional

PyTree: TypeAlias = Any
LossFn: TypeAlias = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes; the frozen parameters are no part of it.

    Attributes:
        adapter: the trainable leaves.
        opt_state: the optimizer's state for them.
        step: int32 scalar, how many updates were made.
        key: PRNG key of the run; each step folds its number into it.
    """

    adapter: PyTree
    opt_state: PyTree
    step: jax.Array
    key: jax.Array


class Metrics(NamedTuple):
    """What a step reports: scalars on the device, so that asking for them is the caller's choice.

    Attributes:
        loss: float32, the weighted mean of the losses before the update.
        grad_norm: float32, global norm of the gradient before clipping.
        weight: float32, the sum of the weights: for a language model, the tokens learned.
        finite: bool, whether loss and gradient were finite, and `finite` was given as True. If
            not, nothing was updated.
    """

    loss: jax.Array
    grad_norm: jax.Array
    weight: jax.Array
    finite: jax.Array


def init_state(adapter: PyTree, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step.

    Args:
        adapter: what to train. Copied, since `jax.jit(step, donate_argnums=0)` takes the buffers.
        tx: the optimizer.
        key: PRNG key of the run, for dropout.
    """
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (adapter, key))
    return TrainState(copy[0], tx.init(copy[0]), jnp.zeros((), jnp.int32), copy[1])


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes a pure function that does one update.

    The gradient is that of `sum of losses / sum of weights` over the whole batch, so micro-batches
    with few weights count for little, and accumulation changes nothing but memory.

    Args:
        loss_fn: `(adapter, params, batch, key) -> (total, weight)`: the sum of the losses, and of
            the weights that they were multiplied with, both scalars. Any function will do; one
            that calls a lifted model on `combine(params, adapter)` trains the adapter.
        tx: the optimizer. Its state may be in host memory, with `lora_jax.offload` outermost.
        accumulate: n, into how many micro-batches a batch is cut; one is in memory at a time. The
            first axis of every leaf of the batch must be a multiple of n.
        max_grad_norm: longer gradients are scaled down to this global norm; `None` for none.

    Returns:
        `step(state, params, batch, finite=True) -> (state, metrics)`, to be compiled with
        `jax.jit(step, donate_argnums=0)`. Where loss or gradient is not finite, or `finite` is
        False, the state comes back as it was. With `metrics.finite` of the step before as
        `finite`, no step changes anything once one has failed, and nobody waits to find out.

    Raises:
        ValueError: `accumulate` is below 1, `max_grad_norm` is not positive, or (when the step is
            called) a leaf of the batch cannot be cut.

    Example:
        >>> def loss_fn(adapter, params, batch, key):
        ...     return jnp.sum((batch * (params + adapter)) ** 2), jnp.sum(batch)
        >>> tx = optax.sgd(0.5)
        >>> step = make_step(loss_fn, tx)
        >>> state = init_state(jnp.zeros(()), tx, jax.random.key(0))
        >>> state, metrics = step(state, 1.0, jnp.ones(4))
        >>> float(metrics.loss), float(state.adapter)
        (1.0, -1.0)
    """
    if accumulate < 1:
        raise ValueError(f"make_step: accumulate: expected at least 1, got {accumulate}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(
            f"make_step: max_grad_norm: expected a positive number or None, got {max_grad_norm}."
        )
    tx = conditional(tx)
    sums = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(adapter: PyTree, params: PyTree, batch: PyTree, key: jax.Array):
        if accumulate == 1:
            return sums(adapter, params, batch, key)
        parts = jax.tree.map_with_path(lambda path, x: _cut(path, x, accumulate), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(sums, adapter, params, first, key)

        def add(carry: PyTree, part: tuple[PyTree, jax.Array]):
            return jax.tree.map(jnp.add, carry, sums(adapter, params, *part)), None

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulate)))[0]

    def step(
        state: TrainState, params: PyTree, batch: PyTree, finite: jax.Array | bool = True
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (total, weight), grads = accumulated(state.adapter, params, batch, key)
        share = 1 / jnp.where(weight > 0, weight, 1)  # Nothing to learn: a zero gradient, no NaN.
        loss = total * share
        grads = jax.tree.map(lambda g: (g * share).astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        finite = finite & jnp.isfinite(loss) & jnp.isfinite(norm)
        if max_grad_norm is not None:
            grads, _ = optax.clip_by_global_norm(max_grad_norm).update(grads, optax.EmptyState())
        updates, opt_state = tx.update(grads, state.opt_state, state.adapter, apply=finite)
        new = dataclasses.replace(
            state,
            adapter=optax.apply_updates(state.adapter, updates),
            opt_state=opt_state,
            step=state.step + finite,
        )
        return new, Metrics(loss, norm, weight, finite)

    return step


def _cut(path: jax.tree_util.KeyPath, leaf: jax.Array, parts: int) -> jax.Array:
    """`[B, ...]` to `[parts, B / parts, ...]`, rows dealt out in turn.

    So every device has rows of each part, and none moves, where the rows are split over devices.
    """
    if not leaf.shape or leaf.shape[0] % parts:
        raise ValueError(
            f"batch{jax.tree_util.keystr(path)}: expected a first axis that accumulate={parts} "
            f"divides, got shape {tuple(leaf.shape)}."
        )
    return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

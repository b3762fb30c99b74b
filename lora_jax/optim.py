"""Optimizers that see the adapter alone, and optimizers that can leave a step out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.tree import Adapted, is_virtual, split


def adapter_only(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer of combined trees update adapters only, with no state for the rest.

    For one-tree code such as Flax's `TrainState`, whose `params` is what `lora_jax.combine`
    returned. (With the adapter as a tree of its own, `tx` needs no wrapping.)

    Args:
      tx: any optax transformation. It sees the adapter alone: gradients, parameters and state.
        Wrappers such as `optax.apply_if_finite` and `optax.MultiSteps` belong inside, around it.

    Returns:
      A transformation of combined trees. The update of a frozen leaf is a scalar zero, which adds
      nothing and takes no memory; under `jit` the frozen leaves' gradients are never computed.

    Example:
      >>> import lora_jax as lora
      >>> params, x = {"w": jnp.ones((8, 8))}, jnp.ones((1, 8))
      >>> fn = lambda params, x: x @ params["w"]
      >>> config = lora.LoraConfig(rank=2, targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, fn, params, x)
      >>> state = adapter_only(optax.adam(1e-3)).init(lora.combine(params, adapter))
      >>> sum(leaf.size for leaf in jax.tree.leaves(state[0].mu))
      32
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> Any:
        return tx.init(_adapter(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        adapter = None if params is None else _adapter(params)
        moves: Any
        moves, state = tx.update(_adapter(updates), state, adapter, **extra)

        def zero(leaf: Any) -> jax.Array:
            # Codes of quantized weights have gradients of no dtype that could be added.
            kind = bool if leaf.dtype == jax.dtypes.float0 else leaf.dtype
            return jnp.zeros((), kind)

        def place(node: Any) -> Any:
            still = jax.tree.map(zero, node)
            if isinstance(node, Adapted):
                return dataclasses.replace(still, update=moves[node.path])
            return still

        return jax.tree.map(place, updates, is_leaf=is_virtual), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Conditional(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update` takes `apply`, as `conditional` describes."""


def conditional(tx: optax.GradientTransformation) -> Conditional:
    """Makes an optimizer leave a step out where it is told to.

    Args:
      tx: any optax transformation; one that is conditional already comes back as it is. Whatever
        moves the state out of device memory must be so: `lora_jax.offload` is.

    Returns:
      A transformation with the state of `tx`, whose `update` takes the keyword `apply`: a boolean
      scalar, or `None` for "yes". Where it is False, the updates are zero and the state comes back
      as it was, so that what is not finite in the gradient reaches neither.

    Raises:
      ValueError: `update` with `apply` finds that `tx` keeps state in host memory.

    Example:
      >>> tx = conditional(optax.adam(0.1))
      >>> state = tx.init(jnp.ones(()))
      >>> updates, state = tx.update(jnp.nan, state, apply=jnp.array(False))
      >>> float(state[0].mu), int(state[0].count)
      (0.0, 0)
    """
    if isinstance(tx, Conditional):
        return tx
    inner = optax.with_extra_args_support(tx)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        apply: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        moves, new = inner.update(updates, state, params, **extra)
        if apply is None:
            return moves, new
        for path, leaf in jax.tree.leaves_with_path(new):
            if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
                raise ValueError(
                    f"conditional: state{jax.tree_util.keystr(path)}: expected device memory, to "
                    "choose between old and new there, got host memory. Put lora_jax.offload "
                    "around the whole optimizer: offload(optax.chain(...))."
                )
        # x + -0.0 is x, and 0.0 would turn -0.0 into 0.0.
        still = lambda move: jnp.where(apply, move, jnp.full_like(move, -0.0))  # noqa: E731
        keep = lambda new, old: jnp.where(apply, new, old)  # noqa: E731
        return jax.tree.map(still, moves), jax.tree.map(keep, new, state)

    return Conditional(inner.init, update_fn)


def _adapter(tree: Any) -> Any:
    adapter = split(tree)[1]
    if not adapter:
        raise ValueError(
            "adapter_only: the tree has no adapter in it. Expected what lora_jax.combine returned."
        )
    return adapter

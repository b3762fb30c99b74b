"""Optimizers for code that keeps base and adapter in one tree."""

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
        zero = lambda leaf: jnp.zeros((), leaf.dtype)  # noqa: E731

        def place(node: Any) -> Any:
            still = jax.tree.map(zero, node)
            if isinstance(node, Adapted):
                return dataclasses.replace(still, update=moves[node.path])
            return still

        return jax.tree.map(place, updates, is_leaf=is_virtual), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _adapter(tree: Any) -> Any:
    adapter = split(tree)[1]
    if not adapter:
        raise ValueError(
            "adapter_only: the tree has no adapter in it. Expected what lora_jax.combine returned."
        )
    return adapter

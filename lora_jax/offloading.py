"""Optimizer state in the host's memory: brought to the device for the update, and sent back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from lora_jax.optim import Conditional, conditional
from lora_jax.tree import split

HOST = "pinned_host"


def offload(tx: optax.GradientTransformation, *, fallback: bool = False) -> Conditional:
    """Keeps an optimizer's state in pinned host memory, between steps and across them.

    A paged optimizer, with the transfers compiled into the step: `update` brings the state to the
    device when the gradients are there, updates it, and sends it back. The numbers are those of
    `tx`. What is saved is the state's memory outside the update, the backward pass above all; what
    it costs is a transfer of all of it there and back in each step.

    Compile the step with parameters and state donated, and return them in the order in which they
    came: JAX pairs donated buffers with results by shape, in order, and may pair a moment in host
    memory with a result on the device, which then fails when it is run.

    Args:
      tx: any optax transformation. Wrappers that look at the state, such as `optax.MultiSteps` and
        `optax.apply_if_finite`, belong inside, around it: outside, they would compute on arrays
        in host memory. Chains may be inside or, with this as a link of them, outside.
      fallback: on devices without such memory, leave the state in device memory.

    Returns:
      A transformation whose state has the structure, shapes, dtypes and shardings of `tx`'s, with
      memory kind `pinned_host` for all but scalars. Arrays with a memory kind belong to the
      devices where they were made: call `init` on parameters that are already in their places.
      Under `jit`, `init` places a sharded state only with `out_shardings`, as any optimizer's.

    Raises:
      ValueError: `init` or `update` meets a device without `pinned_host`, and `fallback` is not
        set.

    Example:
      >>> tx = offload(optax.adam(0.1))
      >>> state = tx.init(jnp.ones(3))
      >>> updates, state = tx.update(jnp.ones(3), state)
      >>> state[0].mu.sharding.memory_kind
      'pinned_host'
    """
    inner = conditional(tx)

    def offloads(tree: Any) -> bool:
        lacking = [device for device in _devices(tree) if HOST not in _memories(device)]
        if lacking and not fallback:
            raise ValueError(
                f"offload: expected devices with {HOST} memory for the optimizer's state, got "
                f"{lacking[0].device_kind} ({lacking[0].platform}), which has "
                f"{', '.join(_memories(lacking[0])) or 'none'}. Pass fallback=True to keep the "
                "state in device memory there, or use the optimizer without offload."
            )
        return not lacking

    def init_fn(params: Any) -> Any:
        if not offloads(params):
            return inner.init(params)
        return _send(inner.init(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not offloads(state):
            return inner.update(updates, state, params, **extra)
        moves, state = inner.update(updates, _fetch(state, updates), params, **extra)
        return moves, _send(state)

    return Conditional(init_fn, update_fn)


def _send(state: Any) -> Any:
    leaves, structure = jax.tree.flatten(state)
    return structure.unflatten(
        [jax.device_put(x, jax.memory.Space.Host) if _goes(x) else x for x in leaves]
    )


def _fetch(state: Any, updates: Any) -> Any:
    """The state on the device, once the gradients are known."""
    leaves, structure = jax.tree.flatten(state)
    away = [leaf for leaf in leaves if _goes(leaf)]
    # XLA starts a transfer as early as it can: the state would arrive at the beginning of the step
    # and stay through the backward pass. But it enters no branch before it knows the condition.
    # Of a combined tree, only the adapter's gradients: the others need not be computed.
    known = _are_finite(split(updates)[1] or updates)
    back = iter(jax.lax.cond(known, _to_device, _to_device, away))
    return structure.unflatten([next(back) if _goes(leaf) else leaf for leaf in leaves])


@jax.custom_batching.custom_vmap
def _are_finite(gradients: Any) -> jax.Array:
    return jnp.isfinite(optax.tree.norm(gradients))


@_are_finite.def_vmap
def _all_are_finite(size: int, batched: Any, gradients: Any) -> tuple[jax.Array, bool]:
    # One answer for the whole batch: with an answer each, the branch would become a `select`.
    return _are_finite(gradients), False


def _to_device(arrays: list[jax.Array]) -> list[jax.Array]:
    return jax.device_put(arrays, jax.memory.Space.Device)


def _goes(leaf: Any) -> bool:
    """Whether a leaf of the state goes to the host: any array but a scalar.

    A transfer of its own for each step count would save four bytes, and the learning rate would
    wait for it.
    """
    return getattr(leaf, "ndim", 0) > 0


def _devices(tree: Any) -> set[Any]:
    """Where a tree's arrays are; while tracing, when nobody knows yet, JAX's first device."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    concrete = [leaf for leaf in arrays if not isinstance(leaf, Tracer)]
    placed = {device for leaf in concrete for device in leaf.sharding.addressable_devices}
    return placed or {jax.local_devices()[0]}


def _memories(device: Any) -> list[str]:
    """The kinds of memory that a device can address."""
    return [memory.kind for memory in device.addressable_memories()]

"""Merging: from a base and an adapter to plain weights for the unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.tree import Adapted, Packed, Update, check_fits, flatten, is_virtual


def merge(params: Any, adapter: Mapping[str, Update], *, requantize: bool = False) -> Any:
    """Plain arrays `W0 + scale * A B`, for the model as it is.

    Computed in float32 (or wider) and cast back to the base's dtype. `params` stays as it is:
    keep it to switch to another adapter.

    Args:
      params: the frozen parameters W0.
      adapter: path -> update.
      requantize: store what was quantized in the same way again, for `lift`, instead of as arrays.
        That rounds to the format's few values: an update smaller than their distance is lost in
        part. Quantized weights without an update stay as they are.

    Returns:
      A tree of the structure, shapes and dtypes of `params`; arrays without an update are shared.

    Raises:
      ValueError: the adapter does not fit `params`; the path and both shapes are named.

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax.adapters.lora import Axes, Lora
      >>> update = Lora(jnp.ones((2, 1)), jnp.ones((1, 3)), Axes((), (0,), (1,)), scale=0.5)
      >>> merge({"w": jnp.ones((2, 3))}, {"w": update})["w"][0]
      Array([1.5, 1.5, 1.5], dtype=float32)
    """

    def add(leaf: Any, update: Update | None) -> Any:
        packed = isinstance(leaf, Packed)
        if update is None and (not is_virtual(leaf) or (packed and requantize)):
            return leaf
        base = _plain(leaf)
        merged = base if update is None else update.add_to(base, 1)
        return leaf.again(merged) if packed and requantize else merged.astype(leaf.dtype)

    return _map(add, params, adapter)


def unmerge(merged: Any, adapter: Mapping[str, Update]) -> Any:
    """Takes an adapter out of merged weights, to within rounding of their dtype.

    Rounding adds up over many rounds; `switch`, which keeps the base, is exact.

    Args:
      merged: what `merge` returned.
      adapter: the adapter it was given.

    Raises:
      ValueError: the adapter does not fit, trains a leaf whole, which loses the base's value, or
        updates a quantized weight, which was rounded after the merge.
    """

    def subtract(leaf: Any, update: Update | None) -> Any:
        if update is None:
            return leaf
        if isinstance(leaf, Packed):
            raise ValueError(
                "expected a plain array, got a quantized weight: what was merged into it and "
                "quantized again cannot be taken out, since the rounding is not known. Keep the "
                "base parameters and use them instead of unmerging."
            )
        return update.add_to(_plain(leaf), -1)

    return _map(subtract, merged, adapter)


def switch(params: Any, adapters: Mapping[str, Mapping[str, Update]], name: str | None) -> Any:
    """The model merged for one task, always from the pristine base.

    Args:
      params: the frozen parameters W0.
      adapters: task name -> adapter.
      name: which task; None for the base itself.

    Returns:
      `merge(params, adapters[name])`; for the base itself plain arrays, too, shared where they are
      plain already. Because the base is never written to, switching to a task and back gives the
      same bits however often it is done.

    Raises:
      KeyError: no adapter has that name; those there are, are listed.
    """
    if name is None:
        return merge(params, {})
    if name not in adapters:
        raise KeyError(f"No adapter is named {name!r}. There are: {sorted(adapters)}.")
    return merge(params, adapters[name])


def _map(function: Callable[[Any, Update | None], Any], params: Any, adapter: Any) -> Any:
    """`function(leaf, its update)` at every leaf, with the leaf's path in its errors."""
    leaves, structure = flatten(params)
    check_fits(dict(leaves), adapter)
    results = []
    for path, leaf in leaves:
        try:
            results.append(function(leaf, adapter.get(path)))
        except ValueError as error:
            message = str(error)
            named = message if message.startswith(f"{path}:") else f"{path}: {message}"
            raise ValueError(named) from None
    return structure.unflatten(results)


def _plain(leaf: Any) -> Any:
    """A leaf as an array: a quantized one in float32 or wider, to be cast when all is added."""
    if isinstance(leaf, Adapted):
        return leaf.update.add_to(_plain(leaf.base), 1)
    if isinstance(leaf, Packed):
        return leaf.form(jnp.promote_types(leaf.dtype, jnp.float32))
    return leaf

"""Merging: from a base and an adapter to plain weights for the unmodified model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.tree import Adapted, Update, check_fits, flatten


def merge(params: Any, adapter: Mapping[str, Update]) -> Any:
    """Plain arrays `W0 + scale * A B`, for the model as it is.

    Computed in float32 (or wider) and cast back to the base's dtype. `params` stays as it is:
    keep it to switch to another adapter.

    Args:
      params: the frozen parameters W0.
      adapter: path -> update.

    Returns:
      A tree of the structure, shapes and dtypes of `params`; leaves without an update are shared.

    Raises:
      ValueError: the adapter does not fit `params`; the path and both shapes are named.

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax.adapters.lora import Axes, Lora
      >>> update = Lora(jnp.ones((2, 1)), jnp.ones((1, 3)), Axes((), (0,), (1,)), scale=0.5)
      >>> merge({"w": jnp.ones((2, 3))}, {"w": update})["w"][0]
      Array([1.5, 1.5, 1.5], dtype=float32)
    """
    return _add(params, adapter, 1)


def unmerge(merged: Any, adapter: Mapping[str, Update]) -> Any:
    """Takes an adapter out of merged weights, to within rounding of their dtype.

    Rounding adds up over many rounds; `switch`, which keeps the base, is exact.

    Args:
      merged: what `merge` returned.
      adapter: the adapter it was given.

    Raises:
      ValueError: the adapter does not fit, or trains a leaf whole, which loses the base's value.
    """
    return _add(merged, adapter, -1)


def switch(params: Any, adapters: Mapping[str, Mapping[str, Update]], name: str | None) -> Any:
    """The model merged for one task, always from the pristine base.

    Args:
      params: the frozen parameters W0.
      adapters: task name -> adapter.
      name: which task; None for the base itself.

    Returns:
      `merge(params, adapters[name])`. Because the base is never written to, switching to a task
      and back gives the same bits however often it is done.

    Raises:
      KeyError: no adapter has that name; those there are, are listed.
    """
    if name is None:
        return params
    if name not in adapters:
        raise KeyError(f"No adapter is named {name!r}. There are: {sorted(adapters)}.")
    return merge(params, adapters[name])


def _add(params: Any, adapter: Mapping[str, Update], sign: int) -> Any:
    leaves, structure = flatten(params)
    check_fits(dict(leaves), adapter)
    merged = []
    for path, leaf in leaves:
        update = adapter.get(path)
        try:
            merged.append(leaf if update is None else update.add_to(_plain(leaf), sign))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return structure.unflatten(merged)


def _plain(leaf: Any) -> Any:
    """A leaf as an array, should it have an adapter on it already."""
    return leaf.update.add_to(_plain(leaf.base), 1) if isinstance(leaf, Adapted) else leaf

"""`init`: an adapter for a function's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.lora import Lora, factor_shapes, sides
from lora_jax.adapters.whole import Whole
from lora_jax.config import ALL_LINEAR, LoraConfig, Settings, select
from lora_jax.initializers.random import start
from lora_jax.transform.roles import Uses, find_uses
from lora_jax.tree import Update, fold_path, is_virtual, leaves_by_path


def init(
    key: jax.Array,
    config: LoraConfig,
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Update]:
    """Makes an adapter: low-rank leaves for the weights that the config selects, nothing else.

    Traces `fn(params, *args, **kwargs)` without computing it and finds for each selected weight
    which axes are contracted (*in*), kept (*out*), or one matrix each (*batch*). So kernels of any
    number of axes, scan-stacked layers, experts, convolutions and embeddings are all one case.

    Args:
      key: random key; each weight derives its own from its path, so that adding a target never
        changes another's values.
      config: what to adapt and how.
      fn: the function the parameters are for, called as `fn(params, *args, **kwargs)`.
      params: its parameters W0, any pytree; arrays, or `jax.ShapeDtypeStruct` if `config.trainable`
        is empty.
      *args: example inputs, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes matter.
      **kwargs: example keyword inputs; Python values are passed as they are.

    Returns:
      path -> update, a pytree. Every low-rank update starts at zero: the adapted function equals
      `fn` exactly.

    Raises:
      ValueError: a pattern matches nothing; a target is never multiplied with; a rank is above its
        weight's smaller side; a leaf is both a target and trainable. The path is named.

    Warns:
      UserWarning: a rank is at least half its weight's smaller side, where a full update of the
        weight (`trainable`) would cost no more.

    Example:
      >>> import lora_jax as lora
      >>> fn = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
      >>> x = jax.ShapeDtypeStruct((1, 8), jnp.float32)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2), fn, params, x)
      >>> {path: (u.lora_a.shape, u.lora_b.shape) for path, u in sorted(adapter.items())}
      {'down': ((32, 2), (2, 8)), 'up': ((8, 2), (2, 32))}
    """
    leaves = leaves_by_path(params)
    floating = {path: leaf for path, leaf in leaves.items() if _is_floating(leaf)}
    whole = select(floating, config.trainable, field="LoraConfig.trainable")
    targets = _targets(config, floating)
    if both := [path for path in targets if path in whole and config.targets != ALL_LINEAR]:
        raise ValueError(
            f"{both[0]}: matched by LoraConfig.targets and by LoraConfig.trainable. A leaf is "
            "adapted or trained whole, not both: narrow one of the patterns or use `exclude`."
        )
    targets = [path for path in targets if path not in whole]
    uses = find_uses(fn, params, args, kwargs, targets)
    if config.targets == ALL_LINEAR:
        targets = [path for path in targets if uses[path].is_linear]
        if not targets:
            raise ValueError(
                'LoraConfig.targets="all-linear": the function multiplies with none of the '
                f"parameters' {len(floating)} floating-point leaves of 2 or more axes."
            )
    adapter: dict[str, Update] = {}
    for path in leaves:
        if path in whole:
            adapter[path] = Whole(_copy(path, leaves[path]))
        elif path in targets:
            settings = config.settings(path)
            adapter[path] = _low_rank(
                fold_path(key, path), path, leaves[path], settings, uses[path]
            )
    return adapter


def _targets(config: LoraConfig, leaves: dict[str, Any]) -> list[str]:
    excluded = select(leaves, config.exclude, field="LoraConfig.exclude")
    if config.targets == ALL_LINEAR:
        chosen = [path for path, leaf in leaves.items() if len(leaf.shape) >= 2]
    elif callable(config.targets):
        chosen = [path for path, leaf in leaves.items() if config.targets(path, leaf)]
    else:
        chosen = select(leaves, config.targets, field="LoraConfig.targets")
    for pattern, _ in config.overrides:
        select(leaves, [pattern], field="LoraConfig.overrides")
    chosen = [path for path in chosen if path not in excluded]
    if not chosen and config.targets != ALL_LINEAR:
        raise ValueError(
            f"LoraConfig.targets selects none of the {len(leaves)} floating-point parameters, "
            f"after {len(excluded)} were excluded. Parameters: {', '.join(list(leaves)[:8])}."
        )
    return chosen


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _copy(path: str, leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{path}: trained whole, so it starts from its value, but `params` is abstract. "
            "Give init the real parameters, or leave `trainable` empty."
        )
    if is_virtual(leaf):
        raise ValueError(
            f"{path}: trained whole, so it must be an array, but it is quantized. Take it out of "
            "`trainable`, or leave it out of `quantize` with `exclude`."
        )
    return jnp.array(leaf, copy=True)  # Its buffer may be donated; the base's must not be.


def _low_rank(key: jax.Array, path: str, leaf: Any, settings: Settings, uses: Uses) -> Lora:
    axes, shape = uses.axes, tuple(leaf.shape)
    if axes is None:
        seen = f" It is used by: {'; '.join(uses.others)}." if uses.others else ""
        raise ValueError(
            f"{path}: selected by LoraConfig.targets, but the function never multiplies with this "
            f"leaf of shape {shape}, so an adapter would not be applied.{seen} Remove it from "
            "`targets`, list it in `exclude`, or train it whole with `trainable`."
        )
    fan_in, fan_out = sides(shape, axes)
    smaller = min(fan_in, fan_out)
    if settings.rank > smaller:
        raise ValueError(
            f"{path}: rank {settings.rank} is above the smaller side of the weight, whose shape "
            f"{shape} (axes: {axes}) makes matrices of {fan_in} x {fan_out}. Expected a rank of at "
            f"most {smaller}: give it one with `overrides`, or list it in `exclude`."
        )
    if 2 * settings.rank >= smaller and smaller > 1:
        warnings.warn(
            f"{path}: rank {settings.rank} is at least half the smaller side of its matrices of "
            f"{fan_in} x {fan_out}; training it whole (`trainable`) would cost no more.",
            stacklevel=4,
        )
    dtype = settings.dtype or jnp.promote_types(leaf.dtype, jnp.float32)
    a_shape, b_shape = factor_shapes(shape, axes, settings.rank)
    a, b = start(
        key, a_shape, b_shape,
        name=settings.init, fan_in=fan_in, lookup=bool(uses.lookups), dtype=dtype,
    )  # fmt: skip
    return Lora(a, b, axes, settings.scale, settings.dropout_rate)

"""The keys and values of tokens already seen, in arrays of a fixed length."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A key-value cache with `S` slots; a pytree, so it can be donated to a jitted step.

    All rows of a batch write the same slot at the same time; what a row may see is decided by
    `segment_ids`, so rows of different lengths are padded with id 0 and stay correct.

    Attributes:
        keys: `[B, S, K, H]` per layer as a tuple, or `[L, B, S, K, H]` for scanned layers.
        values: As `keys`.
        positions: int32 `[B, S]`, the position of the token in each slot.
        segment_ids: int32 `[B, S]`, the segment of the token in each slot.
        length: int32 scalar, the number of slots in use.
    """

    keys: Any
    values: Any
    positions: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def init_cache(config: DecoderConfig, batch_size: int, length: int) -> Cache:
    """Returns an empty cache.

    Args:
        config: The decoder that will fill it.
        batch_size: `B`, rows.
        length: `S`, slots; the caller must not feed more tokens than this in total.

    Returns:
        A `Cache` of zeros in the config's dtype.

    Raises:
        ValueError: If either number is below 1.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(
            f"init_cache: expected batch_size and length of at least 1, got {batch_size} and "
            f"{length}."
        )
    shape = (batch_size, length, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(config.dtype)

    # A fresh array for every leaf: a buffer cannot be donated twice.
    def zeros():
        if config.scan_layers:
            return jnp.zeros((config.num_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    return Cache(
        keys=zeros(),
        values=zeros(),
        positions=jnp.zeros((batch_size, length), jnp.int32),
        segment_ids=jnp.zeros((batch_size, length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )

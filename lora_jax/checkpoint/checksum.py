"""Checksums of arrays, computed where they lie: the same on every mesh, and nothing is gathered."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def checksums(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """A number for each array that changes with any of its bits, and with their order.

    For an array of 32-bit words w_i it is sum_i mix(w_i xor mix(i)) modulo 2^32. `mix` maps words
    to words one to one, so a change of one word always changes the sum, and any other damage goes
    unseen once in 2^32. Sums of integers modulo 2^32 are exact in any order, so the number does
    not depend on how the array is sharded.

    Args:
      arrays: name -> array, on one device or sharded over one mesh.

    Returns:
      uint32 `[n]` in the order of the names, on every device. It is not waited for.
    """
    ordered = [arrays[name] for name in sorted(arrays)]
    meshes = [x.sharding.mesh for x in ordered if isinstance(x.sharding, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return jax.jit(_checksums, out_shardings=everywhere)(ordered)


def _checksums(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(array) for array in arrays])


def _checksum(x: jax.Array) -> jax.Array:
    if jax.typeof(x).memory_space == jax.memory.Space.Host:
        x = jax.device_put(x, jax.memory.Space.Device)
    total = jnp.zeros((), jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * np.uint32(size) + index
    for part, words in enumerate(_words(x)):
        mixed = _mix(words ^ _mix(place + np.uint32(part * 0x9E3779B9 % 2**32)))
        total += jnp.sum(mixed, dtype=jnp.uint32)
    return total


def _words(x: jax.Array) -> list[jax.Array]:
    """The bits of each element, as one or more arrays of its shape."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(x.real) + _words(x.imag)
    if x.dtype == bool:
        return [x.astype(jnp.uint32)]
    if x.dtype.itemsize == 8:
        halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return [halves[..., 0], halves[..., 1]]
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return [jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)]


def _mix(word: jax.Array) -> jax.Array:
    """Spreads every bit of uint32 words over all of theirs: the finaliser "lowbias32"."""
    word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
    return word ^ (word >> 16)

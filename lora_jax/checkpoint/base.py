"""Which base an adapter belongs to: a fingerprint, and how two of them differ."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import Format
from lora_jax.quantization.quantized import Quantized, quantize_array
from lora_jax.tree import leaves_by_path


def fingerprint(params: Any) -> dict[str, Any]:
    """What tells one base from another: shapes, dtypes, and a hash over a few values of each leaf.

    Args:
      params: the parameters; leaves may be sharded, also over several processes, all of which call
        this then. Only samples are fetched.

    Returns:
      `{"leaves": {path: "dtype[shape]"}, "quantized": {path: its format and axes}, "sha256": hash
      over the samples}`.
    """
    leaves = {k: v for k, v in sorted(leaves_by_path(params).items()) if hasattr(v, "shape")}
    digest = hashlib.sha256()
    for path, leaf in leaves.items():
        digest.update(path.encode())
        for array in jax.tree.leaves(leaf):
            digest.update(_sample(array).tobytes())
    kinds = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}
    quantized = {k: _how_stored(v) for k, v in leaves.items() if isinstance(v, Quantized)}
    return {"leaves": kinds, "quantized": quantized, "sha256": digest.hexdigest()}


def abstract_base(base: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that a fingerprint is of, without their values.

    Args:
      base: what `fingerprint` returned, also after JSON.

    Returns:
      path -> `jax.ShapeDtypeStruct`, or a `Quantized` of such.
    """
    leaves: dict[str, Any] = {}
    for path, kind in base["leaves"].items():
        dtype, shape = kind.rstrip("]").split("[")
        sizes = tuple(map(int, filter(None, shape.split(", "))))
        leaves[path] = jax.ShapeDtypeStruct(sizes, np.dtype(dtype))
        if stored := base["quantized"].get(path):
            axes = Axes(**{group: tuple(indices) for group, indices in stored["axes"].items()})
            leaves[path] = quantize_array(leaves[path], axes, _format(stored), path=path)
    return leaves


def difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """How one fingerprint differs from another: a sentence, empty if it does not.

    Args:
      saved: the one expected.
      given: the one found.
    """
    ours, theirs = saved["leaves"], given["leaves"]
    for path in sorted({*ours, *theirs}):
        if ours.get(path) != theirs.get(path):
            return (
                f"{path}: expected {ours.get(path, 'no such parameter')}, "
                f"got {theirs.get(path, 'no such parameter')}."
            )
        formats = [each["quantized"].get(path) for each in (saved, given)]
        if formats[0] != formats[1]:
            expected, got = ("plain numbers" if f is None else str(_format(f)) for f in formats)
            return f"{path}: expected {expected}, got {got}."
    same = saved["sha256"] == given["sha256"]
    return "" if same else "Paths, shapes and dtypes agree, but the values differ."


def _sample(array: Any) -> np.ndarray:
    """A few values, spread over the array; the same however it is sharded."""
    strides = tuple(max(1, size // 4) for size in array.shape)
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        take = jax.jit(_spread, static_argnums=(1, 2), out_shardings=everywhere)
        return np.asarray(take(array, strides, everywhere))
    return np.asarray(array[tuple(slice(None, None, stride) for stride in strides)])


def _spread(array: jax.Array, strides: tuple[int, ...], everywhere: NamedSharding) -> jax.Array:
    places = tuple(slice(None, None, stride) for stride in strides)
    return array.at[places].get(out_sharding=everywhere)


def _how_stored(leaf: Quantized) -> dict[str, Any]:
    format = leaf.format
    return {
        "format": format.name,
        "block_size": format.block_size,
        "double_quant": format.double_quant,
        "axes": {group: list(axes) for group, axes in dataclasses.asdict(leaf.axes).items()},
    }


def _format(stored: Mapping[str, Any]) -> Format:
    return Format(stored["format"], stored["block_size"], stored["double_quant"])

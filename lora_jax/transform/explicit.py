"""Meshes with explicit axes, where every array's type says how it is split.

What a rule computes on the way to an equation's output is no part of the function that was traced,
so nothing says how it is to be split: that is left to the compiler, as on automatic axes. The
output then has the type that the function gave it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def automatic(function: Callable[..., Any], sharding: Any) -> Callable[..., Any]:
    """A function that computes on automatic axes, and whose one result is split as given.

    Args:
      function: of arrays, or of pytrees of them, to one array.
      sharding: of the result, as its type says. Without explicit axes, `function` comes back.
    """
    axes = explicit_axes(sharding)
    if not axes:
        return function
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)


def explicit_axes(sharding: Any) -> tuple[str, ...]:
    """Names of the mesh's axes that are explicit."""
    if not isinstance(sharding, NamedSharding):
        return ()
    mesh = sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)

"""`lift`: any JAX function, taking virtual weights wherever it takes arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import numpy as np
from jax.extend import core

from lora_jax.transform import (
    compat,
    contraction,
    control_flow,
    convolution,
    custom,
    elementwise,
    lookup,
    structural,
)
from lora_jax.transform.explicit import explicit_axes
from lora_jax.transform.view import view_of
from lora_jax.transform.walk import Walk
from lora_jax.tree import Adapted, Packed, is_virtual

RULES = {
    **structural.RULES,
    **elementwise.RULES,
    **contraction.RULES,
    **convolution.RULES,
    **lookup.RULES,
    **control_flow.RULES,
    **custom.RULES,
}

_WRAPPERS = ("jit", "pjit", "remat2", "checkpoint")

P = ParamSpec("P")
T = TypeVar("T")


def lift(fn: Callable[P, T], *, dense: Literal["error", "allow"] = "error") -> Callable[P, T]:
    """Lets a function take virtual weights wherever it takes arrays.

    `fn` is traced with ordinary abstract arrays and its equations are evaluated again: those that
    no virtual weight reaches as they are, the others by low-rank rules, so that `x @ W` becomes
    `x @ W0 + scale * (x @ A) @ B` and `A @ B` is never formed. Under an outer `jit` all of this
    happens at trace time.

    As under `jit`, arrays are traced and other Python values (bools, strings, None, functions) are
    seen as they are.

    Args:
      fn: any JAX function: a Flax `apply`, a function around `nnx.merge`, a plain function.
      dense: what to do where a weight is needed as one dense array because its use has no low-rank
        rule: `"error"` raises, `"allow"` forms it.

    Returns:
      A function of the same arguments. A virtual weight that `fn` returns unchanged comes back as
      it went in.

    Raises:
      ValueError: (by the returned function) a use needs the dense weight; the message has the
        weight's path, the primitive and the source line.

    Example:
      >>> import jax.numpy as jnp
      >>> import lora_jax as lora
      >>> fn = lambda w, x: jnp.tanh(x @ w)
      >>> w, x = jnp.eye(6), jnp.ones((2, 6))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="*"), fn, w, x)
      >>> bool((lift(fn)(lora.combine(w, adapter), x) == fn(w, x)).all())
      True
    """
    if dense not in ("error", "allow"):
        raise ValueError(f"lift: dense: expected 'error' or 'allow', got {dense!r}.")

    @functools.wraps(fn)
    def lifted(*args: P.args, **kwargs: P.kwargs) -> T:
        trace = trace_call(fn, args, kwargs)
        values = [view_of(leaf, slot) for slot, leaf in enumerate(trace.arrays)]
        walk = Walk(RULES, allow_dense=dense == "allow")
        outputs = walk.run(trace.jaxpr, trace.consts, values)
        return trace.result(
            [
                walk.array(out, "returning it") if place is None else trace.arrays[place]
                for out, place in zip(outputs, _forwarded(trace.jaxpr), strict=True)
            ]
        )

    return lifted


@dataclasses.dataclass(frozen=True)
class Trace:
    """A function traced at some arguments.

    Attributes:
      jaxpr: its equations, one input for each of `arrays`.
      consts: values of the jaxpr's constants.
      arrays: the arguments' arrays and virtual weights, in order.
      result: builds what the function returns from the jaxpr's outputs.
    """

    jaxpr: Any
    consts: list[Any]
    arrays: list[Any]
    result: Callable[[list[Any]], Any]


def trace_call(fn: Callable[..., Any], args: Any, kwargs: Any) -> Trace:
    """Traces `fn(*args, **kwargs)`; arrays may be abstract, virtual weights stand for arrays."""
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_virtual)
    places = [place for place, leaf in enumerate(leaves) if is_array(leaf)]
    returned: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        call_args, call_kwargs = structure.unflatten(filled)
        out, out_structure = jax.tree.flatten(fn(*call_args, **call_kwargs))
        returned[:] = [out_structure, [None if is_array(leaf) else (leaf,) for leaf in out]]
        return [leaf for leaf in out if is_array(leaf)]

    arrays = [leaves[place] for place in places]
    jaxpr, consts = compat.trace(flat, *map(_stand_in, arrays))

    def result(outputs: list[Any]) -> Any:
        out_structure, statics = returned
        rest = iter(outputs)
        return out_structure.unflatten([next(rest) if s is None else s[0] for s in statics])

    return Trace(jaxpr, consts, arrays, result)


def _forwarded(jaxpr: Any) -> list[int | None]:
    """Which input each output is, unchanged, be it through nested functions; None if it is none."""
    places = {var: place for place, var in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        if equation.primitive.name not in _WRAPPERS:
            continue
        inner, _ = compat.open_jaxpr(equation.params["jaxpr"])
        for out, place in zip(equation.outvars, _forwarded(inner), strict=True):
            given = None if place is None else equation.invars[place]
            if not isinstance(given, core.Literal) and given in places:
                places[out] = places[given]
    return [None if isinstance(var, core.Literal) else places.get(var) for var in jaxpr.outvars]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced: an array, abstract or not, or a virtual weight."""
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return isinstance(leaf, kinds) or is_virtual(leaf)


def _stand_in(leaf: Any) -> Any:
    if isinstance(leaf, Adapted):
        return _stand_in(leaf.base)
    if not isinstance(leaf, Packed):
        return leaf
    leaf.check()
    kept = {"sharding": leaf.sharding} if explicit_axes(leaf.sharding) else {}
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, **kept)

"""The one file that knows the internals of a JAX version.

Everything else in the transform uses public API. Written against JAX 0.10 and 0.12.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import source_info_util
from jax.core import Tracer
from jax.interpreters import partial_eval


def trace(function: Any, *args: Any) -> tuple[Any, list[Any]]:
    """The jaxpr of `function(*args)` without equations that no output needs, and its constants."""
    jaxpr, consts = open_jaxpr(jax.make_jaxpr(function)(*args))
    # Dead code may use a weight in a way that has no rule, and its FLOPs would be counted.
    jaxpr, used, _ = partial_eval.dce_jaxpr_consts(
        jaxpr, [True] * len(jaxpr.outvars), instantiate=True
    )
    return jaxpr, [const for const, needed in zip(consts, used, strict=True) if needed]


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Splits a closed jaxpr, or takes an open one, as `(jaxpr, consts)`."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def bind(equation: Any, inputs: list[Any]) -> list[Any]:
    """Evaluates an equation as it is."""
    params = equation.primitive.get_bind_params(equation.params)
    out = equation.primitive.bind(*inputs, **params)
    return list(out) if equation.primitive.multiple_results else [out]


@contextlib.contextmanager
def context(equation: Any) -> Iterator[None]:
    """Names, source lines and settings under which the equation was traced."""
    names = source_info_util.current_name_stack() + equation.source_info.name_stack
    with (
        source_info_util.user_context(equation.source_info.traceback, name_stack=names),
        equation.ctx.manager,
    ):
        yield


def source_line(equation: Any) -> str:
    """The user's file, line and function that an equation came from."""
    return source_info_util.summarize(equation.source_info)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # JAX 0.11 and later keep the three groups of inputs as one flat tree.
    consts, carry, _ = (len(list(group)) for group in params["ft_in"].unpack())
    return consts, carry


def jit_shardings(params: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Shardings that a nested jit asks for, of its inputs and outputs; None where it asks none."""
    return tuple(
        # One left to the compiler is a marker, not a sharding.
        [s if isinstance(s, jax.sharding.Sharding) else None for s in params[name]]
        for name in ("in_shardings", "out_shardings")
    )  # type: ignore[return-value]


def shard_map_params(params: dict[str, Any]) -> dict[str, Any]:
    """A shard_map equation's parameters, as `jax.shard_map` takes them."""
    manual = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"  # 0.10.0
    return {
        "mesh": params["mesh"],
        "in_specs": tuple(params["in_specs"]),
        "out_specs": tuple(params["out_specs"]),
        "axis_names": set(params[manual]),
        "check_vma": params["check_vma"],
    }


def is_tracer(value: Any) -> bool:
    """Whether a value is being traced rather than computed."""
    return isinstance(value, Tracer)

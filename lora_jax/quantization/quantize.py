"""`quantize`: 4-bit weights in a function's parameters, and `dequantize`, back to arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.lora import Axes
from lora_jax.config import matches, select
from lora_jax.quantization.formats import Format, FormatName, check_compute_dtype
from lora_jax.quantization.quantized import Quantized, quantize_array
from lora_jax.transform.roles import Uses, find_uses
from lora_jax.tree import Adapted, flatten, is_virtual

EVERY = "*"


def quantize(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    targets: tuple[str, ...] | str = (EVERY,),
    exclude: tuple[str, ...] | str = (),
    format: FormatName = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    **kwargs: Any,
) -> Any:
    """Puts 4-bit weights into a function's parameters, as in QLoRA (arXiv:2305.14314).

    Traces `fn(params, *args, **kwargs)` as `init` does and lets blocks run along the axes of each
    weight that are contracted, for each output. `lift(fn)` takes the result in place of `params`,
    with or without an adapter on it; a weight is formed where it is multiplied with, and again in
    the backward pass; it is never kept, unless a policy of `jax.checkpoint` such as
    `everything_saveable` says to keep all that is computed.

    Args:
      fn: the function the parameters are for.
      params: its parameters, any pytree; arrays, or `jax.ShapeDtypeStruct`, for which the result
        is abstract, too.
      *args: example inputs, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes matter.
      targets: glob patterns over "/"-joined paths. `"*"` is every weight of two or more axes that
        `fn` multiplies with, looked-up tables left out; any other pattern means all it matches.
        What `fn` also needs as one array, `lift` refuses when it is called: `exclude` it.
      exclude: glob patterns of leaves that `targets` matches but that stay as they are.
      format: `"nf4"` or `"fp4"` (4 bits), or `"int8"` (8 bits, one scale for each output; the next
        two options are not used).
      block_size: how many elements share a scale, a power of two from 32 to 4096.
      double_quant: quantize the scales too: 4.127 bits an element instead of 4.5, at 64.
      compute_dtype: dtype in which weights are formed. Where `fn` multiplies in a wider one, they
        are cast to it: the model's own arithmetic stays as it is.
      **kwargs: example keyword inputs.

    Returns:
      `params` with a `Quantized` at each target; other leaves are shared.

    Raises:
      ValueError: a pattern matches nothing; a target is not floating, has a NaN or an infinity, is
        quantized or adapted already, or `fn` neither multiplies with it nor looks up its rows; the
        format's options are out of range. The path is named.

    Example:
      >>> import lora_jax as lora
      >>> fn = lambda params, x: x @ params["w"] + params["b"]
      >>> params = {"w": jnp.eye(64), "b": jnp.zeros(64)}
      >>> x = jnp.ones((1, 64))
      >>> small = quantize(fn, params, x)
      >>> round(8 * small["w"].nbytes / small["w"].size, 2), small["b"].shape
      (4.14, (64,))
      >>> lora.lift(fn)(small, x)[0, 0]
      Array(1., dtype=float32)
    """
    kind = Format(format, block_size, double_quant)
    check_compute_dtype(compute_dtype)
    leaves, structure = flatten(params)
    named = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    chosen, every = _targets(named, targets, exclude)
    candidates = [path for path in (*chosen, *every) if not is_virtual(named[path])]
    uses = find_uses(fn, params, args, kwargs, candidates)
    axes = {path: _axes(path, named[path], uses.get(path)) for path in chosen}
    axes |= {path: _axes(path, named[path], uses[path]) for path in every if uses[path].is_linear}
    if not axes:
        already = sum(map(is_virtual, named.values()))
        raise ValueError(
            f'quantize: targets="*": of {len(named)} parameters, {already} are quantized or '
            "adapted already, and of the others that are not excluded there is none that the "
            "function multiplies with. Name them by patterns to see why each is left out."
        )
    out = [
        quantize_array(leaf, axes[path], kind, compute_dtype=compute_dtype, path=path)
        if path in axes else leaf
        for path, leaf in leaves
    ]  # fmt: skip
    return structure.unflatten(out)


def dequantize(tree: Any) -> Any:
    """Plain arrays, in the dtypes that the weights had, for the function as it is.

    Args:
      tree: parameters with quantized weights, which may have adapters on them.

    Returns:
      The tree with each quantized weight formed, in float32 and then cast.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return leaf.form(jnp.promote_types(leaf.dtype, jnp.float32)).astype(leaf.dtype)
        if isinstance(leaf, Adapted):
            return Adapted(one(leaf.base), leaf.update, leaf.dropout_key, leaf.path)
        return leaf

    return jax.tree.map(one, tree, is_leaf=is_virtual)


def _targets(
    leaves: dict[str, Any], targets: tuple[str, ...] | str, exclude: tuple[str, ...] | str
) -> tuple[list[str], list[str]]:
    """Paths that must be quantized, and those that are if they can be."""
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"quantize: targets: expected glob patterns, got {targets!r}.")
    without = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    excluded = select(leaves, without, field="quantize: exclude")
    paths = [path for path in leaves if path not in excluded]
    strict = tuple(pattern for pattern in patterns if pattern != EVERY)
    select(leaves, strict, field="quantize: targets")
    chosen = [path for path in paths if any(matches(path, pattern) for pattern in strict)]
    if EVERY not in patterns:
        return chosen, []
    every = [
        path for path in paths
        if path not in chosen and len(leaves[path].shape) >= 2 and not is_virtual(leaves[path])
        and jnp.issubdtype(leaves[path].dtype, jnp.floating) and 0 not in leaves[path].shape
    ]  # fmt: skip
    return chosen, every


def _axes(path: str, leaf: Any, uses: Uses | None) -> Axes:
    """What the axes of a target do; rows of a looked-up table are quantized along themselves."""
    if uses is None:
        raise ValueError(
            f"{path}: is a {type(leaf).__name__} already; expected an array. Leave it out of "
            "`targets`, and put adapters on after quantizing."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{path}: cannot be quantized: expected floating-point values, got {leaf.dtype} of "
            f"shape {tuple(leaf.shape)}. Leave it out of `targets`, or list it in `exclude`."
        )
    axes = next((axes for axes in uses.products if axes.inputs), None)
    if axes is None and uses.lookups:
        table = uses.lookups[0]
        axes = Axes(table.batch, table.outputs, table.inputs)
    if axes is None or not axes.inputs:
        seen = f" It is used by: {'; '.join(uses.others)}." if uses.others else ""
        raise ValueError(
            f"{path}: selected by quantize's targets, but the function never multiplies with this "
            f"leaf of shape {tuple(leaf.shape)}, so a 4-bit weight cannot stand for it.{seen} "
            "Leave it out of `targets`, or list it in `exclude`."
        )
    return axes

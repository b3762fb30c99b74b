"""Starts for an adapter on a quantized base: the adapter takes up what rounding loses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lora_jax.adapters.lora import Axes, Lora
from lora_jax.quantization.formats import over
from lora_jax.quantization.quantized import Quantized
from lora_jax.tree import Update, check_fits, flatten, leaves_by_path


def loftq(
    params: Any, quantized: Any, adapter: Mapping[str, Update], *, iterations: int = 5
) -> tuple[Any, dict[str, Update]]:
    """LoftQ: quantized base and adapter that together are near the full weights.

    Alternates `Q = quantize(W - scale A B)` and `scale A B = SVD_r(W - Q)`, starting from A B = 0
    (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    Args:
      params: the full weights W.
      quantized: what `quantize` made of them: which weights, in what format.
      adapter: what `init` made: which weights, of what rank and scale. Its values are replaced
        where the base is quantized; other updates stay.
      iterations: T, at least 1.

    Returns:
      `(quantized, adapter)`, to be used together: the model starts at `Q + scale A B`, not at `Q`.

    Raises:
      ValueError: the trees do not fit each other; no weight of the adapter is quantized; an update
        of a quantized weight is not low-rank; a full weight is no array; iterations is below 1.

    Example:
      >>> import lora_jax as lora
      >>> fn = lambda w, x: x @ w
      >>> w, x = jax.random.normal(jax.random.key(0), (64, 64)), jnp.ones((1, 64))
      >>> base = lora.quantize(fn, w, x, targets="*")
      >>> adapter = lora.init(jax.random.key(1), lora.LoraConfig(rank=8, targets="*"), fn, base, x)
      >>> error = lambda base, adapter: float(jnp.linalg.norm(w - lora.merge(base, adapter)))
      >>> near = loftq(w, base, adapter)
      >>> error(*near) < 0.8 * error(base, adapter)
      True
    """
    return _alternate(params, quantized, adapter, iterations=iterations, principal=False)


def pissa(
    params: Any, quantized: Any, adapter: Mapping[str, Update], *, iterations: int = 1
) -> tuple[Any, dict[str, Update]]:
    """PiSSA on a quantized base: the adapter holds the principal directions, the base the rest.

    Starts from `scale A B = SVD_r(W)` and quantizes the rest, `Q = quantize(W - scale A B)`, whose
    values are smaller and so lose less (Meng et al. 2024, arXiv:2404.02948, section 4). Further
    iterations alternate as in `loftq`.

    Args:
      params: the full weights W.
      quantized: what `quantize` made of them: which weights, in what format.
      adapter: what `init` made: which weights, of what rank and scale.
      iterations: T, at least 1.

    Returns:
      `(quantized, adapter)`, to be used together.

    Raises:
      ValueError: as `loftq`.
    """
    return _alternate(params, quantized, adapter, iterations=iterations, principal=True)


def _alternate(
    params: Any, quantized: Any, adapter: Mapping[str, Update], *, iterations: int, principal: bool
) -> tuple[Any, dict[str, Update]]:
    name = "pissa" if principal else "loftq"
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{name}: iterations: expected at least 1, got {iterations}.")
    full = leaves_by_path(params)
    leaves, structure = flatten(quantized)
    check_fits(full, adapter)
    check_fits(dict(leaves), adapter)
    started = dict(adapter)
    bases = []
    for path, base in leaves:
        update = adapter.get(path)
        if isinstance(base, Quantized) and update is not None:
            update = _check(name, path, full[path], update)
            base, started[path] = _start(
                full[path], base, update, iterations=iterations, principal=principal
            )
        bases.append(base)
    if not any(isinstance(base, Quantized) and path in adapter for path, base in leaves):
        raise ValueError(
            f"{name}: none of the adapter's {len(adapter)} weights is quantized. Give it what "
            "`quantize` returned, and an adapter with targets among the quantized weights."
        )
    return structure.unflatten(bases), started


def _check(name: str, path: str, weight: Any, update: Update) -> Lora:
    if not isinstance(update, Lora):
        raise ValueError(
            f"{path}: {name} starts low-rank updates, got a {type(update).__name__} on a quantized "
            "weight. Leave the weight out of `quantize`, or out of `trainable`."
        )
    if not isinstance(weight, (jax.Array, np.ndarray)):
        raise ValueError(
            f"{path}: {name}: expected the full weight, got a {type(weight).__name__}. Give the "
            "parameters as they were before `quantize`, first."
        )
    return update


def _start(
    weight: Any, base: Quantized, update: Lora, *, iterations: int, principal: bool
) -> tuple[Quantized, Lora]:
    """Q and A, B for one weight, all matrices of a stack."""
    # The update's own: of a looked-up table they are the other way round.
    axes, wide = update.axes, jnp.promote_types(base.dtype, jnp.float32)
    weight = jnp.asarray(weight).astype(wide)
    a, b = update.lora_a, update.lora_b

    def delta(a: jax.Array, b: jax.Array) -> jax.Array:
        moved = Lora(a, b, axes, update.scale)
        return moved.add_to(jnp.zeros(weight.shape, wide), 1)

    if principal:
        a, b = _nearest_factors(weight, axes=axes, rank=update.rank, scale=update.scale)
    for iteration in range(iterations):
        rest = weight - delta(a, b) if principal or iteration else weight
        base = base.again(rest)
        if not principal or iteration < iterations - 1:
            a, b = _nearest_factors(
                weight - base.form(wide), axes=axes, rank=update.rank, scale=update.scale
            )
    a, b = (
        new.astype(old.dtype).reshape(old.shape)
        for new, old in ((a, update.lora_a), (b, update.lora_b))
    )
    return base, Lora(a, b, axes, update.scale, update.dropout_rate)


@functools.partial(jax.jit, static_argnames=("axes", "rank", "scale"))
def _nearest_factors(
    weight: Float[Array, "..."], *, axes: Axes, rank: int, scale: float
) -> tuple[Float[Array, "*batch_in rank"], Float[Array, "*batch_rank_out"]]:
    """A and B with `scale A B` the nearest of that rank: `U sqrt(S/scale)`, `sqrt(S/scale) V`."""
    batch, inputs, outputs = (
        tuple(weight.shape[axis] for axis in group)
        for group in (axes.batch, axes.inputs, axes.outputs)
    )
    matrices = weight.transpose(*axes.batch, *axes.inputs, *axes.outputs)
    matrices = matrices.reshape(*batch, int(np.prod(inputs)), int(np.prod(outputs)))

    def one(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        root = jnp.sqrt(s[:rank] / scale)
        return u[:, :rank] * root, root[:, None] * vt[:rank]

    # One matrix of a stack after the other: U and V of all would be twice the full weights.
    factors = over(max(0, len(batch) - 1), one)
    a, b = lax.map(factors, matrices) if batch else factors(matrices)
    return a.reshape(*batch, *inputs, rank), b.reshape(*batch, rank, *outputs)

"""Random starts: one factor random, the other zero, so that the update starts at zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kaiming(
    key: jax.Array, shape: tuple[int, ...], *, fan_in: int, dtype: Any
) -> Float[Array, "..."]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), the start of Hugging Face PEFT and of the authors' code.

    Args:
      key: a key for this factor alone.
      shape: shape of A, `[*batch, *in, rank]`.
      fan_in: size of the in side.
      dtype: dtype of A.
    """
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(
    key: jax.Array, shape: tuple[int, ...], *, rank: int, dtype: Any
) -> Float[Array, "..."]:
    """A ~ N(0, 1/rank^2): Gaussian as in the paper (arXiv:2106.09685, section 4.1).

    Args:
      key: a key for this factor alone.
      shape: shape of A, `[*batch, *in, rank]`.
      rank: r; the standard deviation is 1/r.
      dtype: dtype of A.
    """
    return jax.random.normal(key, shape, dtype) / rank


def start(
    key: jax.Array,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    *,
    name: str,
    fan_in: int,
    lookup: bool,
    dtype: Any,
) -> tuple[Float[Array, "*batch_in rank"], Float[Array, "*batch_rank_out"]]:
    """A and B as training finds them; their product is zero.

    A looked-up table starts the other way round, A zero and B ~ N(0, 1), as embeddings do in PEFT:
    with a random A, rows that are never looked up would still carry noise.

    Args:
      key: a key for this weight alone.
      a_shape: `[*batch, *in, rank]`.
      b_shape: `[*batch, rank, *out]`.
      name: `"kaiming"` or `"gaussian"`.
      fan_in: size of the in side.
      lookup: whether the weight is a looked-up table.
      dtype: dtype of both.
    """
    if lookup:
        return jnp.zeros(a_shape, dtype), jax.random.normal(key, b_shape, dtype)
    if name == "kaiming":
        a = kaiming(key, a_shape, fan_in=fan_in, dtype=dtype)
    else:
        a = gaussian(key, a_shape, rank=a_shape[-1], dtype=dtype)
    return a, jnp.zeros(b_shape, dtype)

"""`while_loop` of a length known only at run time: forward mode, as in JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora

from .cases import X, normal, random_like

W = normal("w", 6, 6)


def constant(w, x, n):
    return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]


def carried(w, x, n):
    def body(carry):
        count, y, w = carry
        return count + 1, jnp.tanh(y @ w), jnp.copy(w)

    return lax.while_loop(lambda c: c[0] < n, body, (0, x, w))[1]


def in_the_condition(w, x, n):
    def proceed(carry):
        count, y = carry
        return (count < n) & ((y @ w).sum() < 1e6)

    return lax.while_loop(proceed, lambda c: (c[0] + 1, c[1] * 0.5 + 0.1), (0, x))[1] @ w


def indexed(w, x, n):
    stack = jnp.stack([x, 2 * x])
    step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ w[c[0] % 3]))  # noqa: E731
    return lax.while_loop(lambda c: c[0] < n, step, (0, stack[0]))[1]


@pytest.mark.parametrize("fn", [constant, carried, in_the_condition, indexed])
def test_against_merged_weights(fn):
    w = normal("stack", 3, 6, 6) if fn is indexed else W
    steps = jnp.int32(4)
    adapter = random_like(lora.init(jax.random.key(0), lora.LoraConfig(rank=2), fn, w, X, steps))
    direction = random_like(adapter, seed=1)

    def run(function):
        primal = jax.jit(lambda a, n: function(a, n))
        return jax.jvp(lambda a: primal(a, steps), (adapter,), (direction,))

    got = run(lambda a, n: lora.lift(fn)(lora.combine(w, a), X, n))
    want = run(lambda a, n: fn(lora.merge(w, a), X, n))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)

"""On four devices: shard_map with the weight split, and pmap over data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora

from .cases import P, mesh, normal, random_like

KEY = jax.random.key(0)
X = normal("x", 8, 16)
W = normal("w", 16, 24)


def adapted(fn, w=W, x=X):
    adapter = random_like(lora.init(KEY, lora.LoraConfig(rank=3, targets="*"), fn, w, x))
    return lora.combine(w, adapter), fn(lora.merge(w, adapter), x)


def by_rows(w, x):
    product = lambda w, x: lax.psum(x @ w, "model")  # noqa: E731
    specs = (P("model"), P(None, "model"))
    return jax.shard_map(product, mesh=mesh(4), in_specs=specs, out_specs=P())(w, x)


def by_columns(w, x):
    specs = (P(None, "model"), P())
    return jax.shard_map(
        lambda w, x: x @ w, mesh=mesh(4), in_specs=specs, out_specs=P(None, "model")
    )(w, x)


def gathered(w, x):
    product = lambda w, x: x @ lax.all_gather(w, "model", axis=1, tiled=True)  # noqa: E731
    specs = (P(None, "model"), P("model"))
    return jax.shard_map(product, mesh=mesh(4), in_specs=specs, out_specs=P("model"))(w, x)


def activations(w, x):
    normalize = lambda y: y / lax.psum((y**2).sum(), "model")  # noqa: E731
    spec = P("model")
    return jax.shard_map(normalize, mesh=mesh(4), in_specs=spec, out_specs=spec)(x @ w)


@pytest.mark.parametrize("fn", [by_rows, by_columns, gathered, activations])
def test_shard_map_on_four_devices(fn):
    tree, want = adapted(fn)
    got, grads = jax.jit(jax.value_and_grad(lambda t: (lora.lift(fn)(t, X) ** 2).sum()))(tree)
    np.testing.assert_allclose(got, (want**2).sum(), rtol=1e-4)
    _, adapter = lora.split(tree)
    reference = jax.grad(lambda a: (fn(lora.merge(W, a), X) ** 2).sum())(adapter)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3),
        lora.split(grads)[1], reference,
    )  # fmt: skip


def test_lift_inside_a_shard_map():
    fn = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    tree, want = adapted(fn)
    data_parallel = jax.shard_map(
        lora.lift(fn), mesh=mesh(4), in_specs=(P(), P("model")), out_specs=P("model")
    )
    np.testing.assert_allclose(jax.jit(data_parallel)(tree, X), want, rtol=1e-4, atol=1e-5)


def test_a_sharding_constraint_reaches_the_factors():
    sharding = NamedSharding(mesh(4), PartitionSpec(None, "model"))
    fn = lambda w, x: x @ lax.with_sharding_constraint(w, sharding)  # noqa: E731
    tree, want = adapted(fn)
    got = jax.jit(lora.lift(fn))(tree, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    text = jax.jit(lora.lift(fn)).lower(tree, X).as_text()
    assert text.count("sharding_constraint") + text.count("@Sharding") == 3, "base, A and B"


def test_pmap_over_the_batch():
    fn = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    tree, want = adapted(fn)
    got = jax.pmap(lora.lift(fn), in_axes=(None, 0))(tree, X.reshape(4, 2, 16))
    np.testing.assert_allclose(got.reshape(8, -1), want, rtol=1e-4, atol=1e-5)


def test_gathering_rows_whose_columns_are_split_is_refused():
    """Every shard has a B of its own then, and the gathered rows have none in common."""

    def fn(w, x):
        product = lambda w, x: x @ lax.all_gather(w, "model", axis=0, tiled=True)  # noqa: E731
        inside = jax.shard_map(
            product, mesh=mesh(4), in_specs=(P(None, "model"), P()), out_specs=P(), check_vma=False
        )
        return inside(w, jnp.concatenate([x] * 4, 1))

    both = lambda w, x: fn(w, x).sum() + (x @ w).sum()  # noqa: E731
    tree, _ = adapted(both)
    with pytest.raises(ValueError, match="all_gather"):
        lora.lift(both)(tree, X)

"""Uses without a low-rank rule: never silent, and formed when that is asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

from .cases import P, X, mesh, normal, random_like

KEY = jax.random.key(0)

DENSE = {
    "a norm of the weight": (lambda w, x: x @ (w / jnp.linalg.norm(w)), "square|mul"),
    "an activation of the weight": (lambda w, x: x @ jnp.tanh(w), "tanh"),
    "a mask on the weight": (lambda w, x: x @ jnp.where(jnp.eye(6) > 0, w, 0), "select_n"),
    "a gain for each output": (lambda w, x: x @ (w * jnp.arange(6.0)), "mul"),
    "axes of both sides merged": (lambda w, x: x @ w.reshape(36)[::-1].reshape(6, 6), "reshape"),
    "an integer cast": (lambda w, x: x @ w.astype(jnp.int8).astype(x.dtype), "convert"),
    "a weight changed in a scan": (
        lambda w, x: x @ jax.lax.scan(lambda c, _: (jnp.tanh(c), None), w, None, length=2)[0],
        "tanh"),
    "a weight changed in a while loop": (
        lambda w, x: x @ jax.lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, w))[1],
        "tanh"),
    "branches that differ": (
        lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: jnp.ones((6, 6)), w),
        "cond"),
    "a weight out of shard_map": (
        lambda w, x: x @ jax.shard_map(
            lambda w: w, mesh=mesh(), in_specs=P(), out_specs=P())(w),
        "shard_map"),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "primitive"), DENSE.values(), ids=list(DENSE))
def test_it_raises_or_forms_the_weight(fn, primitive):
    params = {"layer": {"w": normal("w", 6, 6)}}
    both = lambda p, x: fn(p["layer"]["w"], x) + x @ p["layer"]["w"]  # noqa: E731
    config = lora.LoraConfig(rank=2, alpha=2, targets="*")
    adapter = random_like(lora.init(KEY, config, both, params, X))
    tree = lora.combine(params, adapter)
    message = rf"(?s)^layer/w: .*({primitive}).* at .*test_dense\.py:\d+.*dense=\"allow\""
    with pytest.raises(ValueError, match=message):
        lora.lift(both)(tree, X)
    with pytest.raises(ValueError, match=message):
        jax.jit(lora.lift(both))(tree, X)
    got = jax.jit(lora.lift(both, dense="allow"))(tree, X)
    want = both(lora.merge(params, adapter), X)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_dead_code_may_use_a_weight_in_any_way():
    def fn(w, x):
        jnp.linalg.norm(w)  # A metric that nobody reads.
        return x @ w

    w = normal("w", 6, 8)
    adapter = random_like(lora.init(KEY, lora.LoraConfig(rank=2, targets="*"), fn, w, X))
    got = lora.lift(fn)(lora.combine(w, adapter), X)
    np.testing.assert_allclose(got, fn(lora.merge(w, adapter), X), rtol=1e-4, atol=1e-5)


def test_a_returned_weight_comes_back_as_it_went_in():
    fn = lambda p, x: (x @ p["w"], p)  # noqa: E731
    params = {"w": normal("w", 6, 8)}
    adapter = lora.init(KEY, lora.LoraConfig(rank=2, targets="*"), fn, params, X)
    tree = lora.combine(params, adapter)
    _, returned = lora.lift(fn)(tree, X)
    assert returned["w"] is tree["w"]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f))])
def test_returned_through_a_nested_function_it_is_the_same(wrap):
    fn = wrap(lambda p, x: (x @ p["w"], p))
    params = {"w": normal("w", 6, 8), "b": jnp.ones(8)}
    config = lora.LoraConfig(rank=2, targets="w", trainable="b")
    tree = lora.combine(params, lora.init(KEY, config, fn, params, X))
    outer = jax.jit(lora.lift(fn))(tree, X)[1]
    assert jax.tree.structure(outer) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, outer, tree)


def test_a_returned_view_of_a_weight_is_refused():
    fn = lambda w, x: (x @ w, w.T)  # noqa: E731
    w = normal("w", 6, 8)
    adapter = lora.init(KEY, lora.LoraConfig(rank=2, targets="*"), fn, w, X)
    with pytest.raises(ValueError, match="returning it"):
        lora.lift(fn)(lora.combine({"a": {"w": w}}["a"]["w"], adapter), X)


def test_python_values_reach_the_function_as_they_are():
    def fn(w, x, *, train, name, scale):
        assert train is True
        assert name == "a"
        return {"y": x @ w * scale, "name": name, "none": None}

    w = normal("w", 6, 8)
    kwargs = {"train": True, "name": "a", "scale": 2}
    adapter = lora.init(KEY, lora.LoraConfig(rank=2, targets="*"), fn, w, X, **kwargs)
    out = lora.lift(fn)(lora.combine(w, adapter), X, **kwargs)
    assert out["name"] == "a"
    np.testing.assert_array_equal(out["y"], fn(w, X, **kwargs)["y"])


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="'error' or 'allow', got 'maybe'"):
        lora.lift(lambda x: x, dense="maybe")


def test_a_stopped_gradient_stays_stopped():
    def fn(w, x):
        return x @ w + jnp.tanh(x) @ jax.lax.stop_gradient(w)

    w = normal("w", 6, 8)
    adapter = random_like(lora.init(KEY, lora.LoraConfig(rank=2, targets="*"), fn, w, X))

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda a: jnp.sin(function(a)).sum()))(adapter)

    got = loss(lambda a: lora.lift(fn)(lora.combine(w, a), X))
    want = loss(lambda a: fn(lora.merge(w, a), X))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want
    )  # fmt: skip


def identity_layer():
    @jax.custom_vjp
    def layer(x, w):
        return x @ w

    layer.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    return layer


def test_dropout_in_a_custom_vjp_is_refused():
    layer = identity_layer()
    fn = lambda p, x: layer(x, p["w"])  # noqa: E731
    params = {"w": normal("w", 6, 8)}
    config = lora.LoraConfig(rank=2, targets="w", dropout_rate=0.1)
    adapter = lora.init(KEY, config, fn, params, X)
    lora.lift(fn)(lora.combine(params, adapter), X)
    with pytest.raises(ValueError, match=r"^w: .*test_dense.*adapter dropout has no meaning"):
        lora.lift(fn)(lora.combine(params, adapter, dropout_key=KEY), X)


def test_a_scalar_on_the_way_into_a_custom_vjp_gets_its_gradient():
    layer = identity_layer()
    fn = lambda p, x: layer(x, p["w"] * p["s"])  # noqa: E731
    params = {"w": normal("w", 6, 8), "s": jnp.float32(1.3)}
    config = lora.LoraConfig(rank=2, targets="w", trainable="s")
    adapter = random_like(lora.init(KEY, config, fn, params, X))
    got = jax.grad(lambda a: jnp.sin(lora.lift(fn)(lora.combine(params, a), X)).sum())(adapter)
    want = jax.grad(lambda a: jnp.sin(fn(lora.merge(params, a), X)).sum())(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)

"""Adapter dropout: on exactly with a key, reproducible, its own in every layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

from .cases import cast, normal, random_like

KEY, OTHER = jax.random.key(1), jax.random.key(2)
RATE = 0.4


def setup(fn, params, *args, **fields):
    config = lora.LoraConfig(rank=2, alpha=2, targets="*", dropout_rate=RATE, **fields)
    adapter = random_like(lora.init(KEY, config, fn, params, *args))

    def run(key, wrap=lambda f: f):
        return wrap(lora.lift(fn))(lora.combine(params, adapter, dropout_key=key), *args)

    return run, adapter


def linear(params, x):
    return x @ params["w"]


W = {"w": normal("w", 32, 24)}
ONES = jnp.ones((4, 32))


def test_without_a_key_there_is_none():
    run, adapter = setup(linear, W, ONES)
    np.testing.assert_allclose(run(None), linear(lora.merge(W, adapter), ONES), atol=1e-4)


def test_a_rate_of_zero_with_a_key_drops_nothing():
    config = lora.LoraConfig(rank=2, targets="*")
    adapter = random_like(lora.init(KEY, config, linear, W, ONES))
    tree = lora.combine(W, adapter, dropout_key=KEY)
    np.testing.assert_array_equal(
        lora.lift(linear)(tree, ONES), lora.lift(linear)(lora.combine(W, adapter), ONES)
    )


def test_only_the_adapters_input_is_dropped():
    """y = x W0 + scale * (mask x / keep) A B, with a mask that we can solve for."""
    eye = {"w": jnp.zeros((32, 32))}
    config = lora.LoraConfig(rank=32, alpha=32, targets="*", dropout_rate=RATE)
    with pytest.warns(UserWarning, match="rank 32"):
        adapter = lora.init(KEY, config, linear, eye, ONES)
    (update,) = adapter.values()
    adapter = {"w": lora.adapters.lora.Lora(
        jnp.eye(32), jnp.eye(32), update.axes, update.scale, update.dropout_rate)}  # fmt: skip
    x = normal("x", 500, 32)
    y = lora.lift(linear)(lora.combine(eye, adapter, dropout_key=KEY), x)
    ratio = np.asarray(y / x)
    kept = np.isclose(ratio, 1 / (1 - RATE), rtol=1e-5)
    assert np.all(kept | (ratio == 0))
    np.testing.assert_allclose(kept.mean(), 1 - RATE, atol=0.02)
    base = {"w": jnp.eye(32)}
    np.testing.assert_allclose(
        lora.lift(linear)(lora.combine(base, adapter, dropout_key=KEY), x), x + y, rtol=1e-5
    )


def test_it_is_reproducible_and_follows_the_key():
    run, _ = setup(linear, W, ONES)
    np.testing.assert_array_equal(run(KEY), run(KEY))
    np.testing.assert_allclose(run(KEY), run(KEY, jax.jit), rtol=1e-6)
    assert not np.allclose(run(KEY), run(OTHER))
    assert not np.allclose(run(KEY)[0], run(KEY)[1]), "rows of the batch share a mask"


def test_a_raw_key_serves():
    run, _ = setup(linear, W, ONES)
    np.testing.assert_array_equal(run(jax.random.key_data(KEY)), run(KEY))


def test_layers_of_a_list_differ():
    twins = {"a": W["w"], "b": W["w"]}
    fn = lambda p, x: (x @ p["a"], x @ p["b"])  # noqa: E731
    config = lora.LoraConfig(rank=2, targets="*", dropout_rate=RATE)
    update = random_like(lora.init(KEY, config, fn, twins, ONES)["a"])
    a, b = lora.lift(fn)(lora.combine(twins, {"a": update, "b": update}, dropout_key=KEY), ONES)
    assert not np.allclose(a, b)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_differ_and_equal_their_unrolled_form(remat):
    stacked = {"w": jnp.stack([W["w"][:, :24][:24]] * 3)}
    x = jnp.ones((4, 24))

    def step(x, w):
        return x, x @ w

    def scanned(p, x):
        return jax.lax.scan(jax.checkpoint(step) if remat else step, x, p["w"])[1]

    def unrolled(p, x):
        return jnp.stack([x @ p["w"][i] for i in range(3)])

    config = lora.LoraConfig(rank=2, targets="*", dropout_rate=RATE)
    adapter = lora.init(KEY, config, scanned, stacked, x)
    one = random_like(jax.tree.map(lambda leaf: leaf[0], adapter))
    adapter = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)
    tree = lora.combine(stacked, adapter, dropout_key=KEY)
    got = lora.lift(scanned)(tree, x)
    assert not np.allclose(got[0], got[1]), "two layers share a mask"
    np.testing.assert_allclose(got, lora.lift(unrolled)(tree, x), rtol=1e-5)


def test_the_recomputed_forward_of_remat_drops_the_same():
    """With another mask in the recomputation, gradients would not be those of the output."""

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T)

    remat = jax.checkpoint(fn)
    config = lora.LoraConfig(rank=2, targets="*", dropout_rate=RATE)
    adapter = random_like(lora.init(KEY, config, fn, W, ONES))

    def grads(function):
        def loss(adapter):
            return (lora.lift(function)(lora.combine(W, adapter, dropout_key=KEY), ONES) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))(adapter)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        grads(remat), grads(fn),
    )  # fmt: skip


def test_on_convolutions_and_experts_the_expectation_is_the_undropped_output():
    image = normal("image", 2, 9, 5)
    kernel = normal("kernel", 3, 5, 24)
    numbers = ("NWC", "WIO", "NWC")

    def conv(w, x):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers)

    def experts(w, x):
        return jax.lax.ragged_dot(x, w, jnp.array([2, 2]))

    for fn, w, x in ((conv, kernel, image), (experts, normal("e", 2, 32, 24), ONES)):
        run, _ = setup(fn, w, x)
        mean = jax.jit(lambda keys, run=run: jax.lax.map(run, keys).mean(0))(
            jax.random.split(KEY, 4000)
        )
        plain = run(None)
        assert not np.allclose(run(KEY), plain)
        spread = float(jnp.abs(run(KEY) - plain).max())
        np.testing.assert_allclose(mean, plain, atol=spread / 10)


def test_in_bfloat16():
    fn, params, x = linear, cast(W, jnp.bfloat16), ONES.astype(jnp.bfloat16)
    run, _ = setup(fn, params, x)
    assert run(KEY).dtype == jnp.bfloat16
    assert not np.allclose(run(KEY).astype(jnp.float32), run(None).astype(jnp.float32))

"""optax over adapters: in a tree of their own, and in one tree with the base."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax as lora
from lora_jax.optim import conditional

from .cases import X, normal, random_like

KEY = jax.random.key(0)
PARAMS = {"a": normal("a", 6, 32), "b": normal("b", 32, 8), "bias": normal("bias", 8)}
TARGET = normal("target", 5, 8)


def fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"]


def make(**fields):
    config = lora.LoraConfig(rank=2, **fields)
    return random_like(lora.init(KEY, config, fn, PARAMS, X))


def loss(tree):
    return ((lora.lift(fn)(tree, X) - TARGET) ** 2).mean()


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1, momentum=0.9)),
    ],
    ids=["adamw", "clipped sgd"],
)
@pytest.mark.parametrize("fields", [{}, {"trainable": "bias"}], ids=["lora", "with a bias"])
@pytest.mark.parametrize("quantized", [False, True], ids=["arrays", "4-bit"])
def test_one_tree_trains_as_two(tx, fields, quantized):
    """The clipping would differ if it saw the frozen leaves' gradients."""
    adapter = make(**fields)
    base = lora.quantize(fn, PARAMS, X, block_size=32) if quantized else PARAMS

    @jax.jit
    def two_trees(adapter):
        state = tx.init(adapter)
        for _ in range(3):
            grads = jax.grad(lambda a: loss(lora.combine(base, a)))(adapter)
            updates, state = tx.update(grads, state, adapter)
            adapter = optax.apply_updates(adapter, updates)
        return adapter

    state = TrainState.create(
        apply_fn=lora.lift(fn), params=lora.combine(base, adapter), tx=lora.adapter_only(tx)
    )

    @jax.jit
    def step(state):
        grads = jax.grad(loss, allow_int=quantized)(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = step(state)
    params, trained = lora.split(state.params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        trained, two_trees(adapter),
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, params, base)


def test_no_state_for_frozen_leaves():
    adapter = make()
    count = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    tree = lora.combine(PARAMS, adapter)
    state = lora.adapter_only(optax.adam(1e-3)).init(tree)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * count + 1


def test_under_jit_frozen_gradients_are_not_computed():
    wide = {"a": normal("a", 128, 128), "b": normal("b", 128, 128), "bias": normal("bias", 128)}
    x = normal("x", 64, 128)
    adapter = lora.init(KEY, lora.LoraConfig(rank=2), fn, wide, x)
    tx = lora.adapter_only(optax.sgd(0.1))

    def loss(tree):
        return (lora.lift(fn)(tree, x) ** 2).mean()

    def one(tree):
        updates, _ = tx.update(jax.grad(loss)(tree), tx.init(tree), tree)
        return lora.split(optax.apply_updates(tree, updates))[1]

    def two(adapter, wide):
        grads = jax.grad(lambda a: loss(lora.combine(wide, a)))(adapter)
        return optax.apply_updates(adapter, jax.tree.map(lambda g: -0.1 * g, grads))

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    one_tree, two_trees = flops(one, lora.combine(wide, adapter)), flops(two, adapter, wide)
    frozen_gradients = 2 * (2 * 64 * 128 * 128)
    assert one_tree < two_trees + 0.05 * frozen_gradients


def test_a_tree_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"no adapter.*combine"):
        lora.adapter_only(optax.sgd(0.1)).init(PARAMS)


@pytest.mark.parametrize(
    "tx", [optax.adamw(1e-2), optax.adafactor(1e-2)], ids=["adamw", "factored"]
)
def test_a_conditional_optimizer_is_the_same_one_or_does_nothing(tx):
    adapter = make()
    grads = random_like(adapter, seed=1)
    ours = conditional(tx)
    _, state = tx.update(grads, tx.init(adapter), adapter)
    wanted = tx.update(grads, state, adapter)
    for options in ({}, {"apply": jnp.array(True)}):
        got = ours.update(grads, state, adapter, **options)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, grads)
    updates, after = ours.update(poisoned, state, adapter, apply=jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, 0)
        assert np.signbit(leaf).all(), "-0.0, which changes no number"
    assert conditional(ours) is ours


def test_a_conditional_optimizer_hands_other_arguments_on():
    tx = conditional(optax.contrib.reduce_on_plateau(patience=1))
    state = tx.init(jnp.ones(2))
    for value in (3.0, 5.0, 5.0):
        _, state = tx.update(jnp.ones(2), state, value=value, apply=jnp.array(value > 4))
    assert float(state.best_value) == 5, "the step with 3.0 was left out"

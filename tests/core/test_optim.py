"""optax over adapters: in a tree of their own, and in one tree with the base."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax as lora

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
def test_one_tree_trains_as_two(tx, fields):
    """The clipping would differ if it saw the frozen leaves' gradients."""
    adapter = make(**fields)

    @jax.jit
    def two_trees(adapter):
        state = tx.init(adapter)
        for _ in range(3):
            grads = jax.grad(lambda a: loss(lora.combine(PARAMS, a)))(adapter)
            updates, state = tx.update(grads, state, adapter)
            adapter = optax.apply_updates(adapter, updates)
        return adapter

    state = TrainState.create(
        apply_fn=lora.lift(fn), params=lora.combine(PARAMS, adapter), tx=lora.adapter_only(tx)
    )

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state)
    params, trained = lora.split(state.params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        trained, two_trees(adapter),
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


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

"""Optimizer state in host memory: the same numbers as without, and really there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

import lora_jax as lora
from lora_jax import offloading

from .cases import P, X, mesh, normal, random_like

KEY = jax.random.key(0)
PARAMS = {"a": normal("a", 6, 32), "b": normal("b", 32, 8)}
TARGET = normal("target", 5, 8)
LIFTED = lora.lift(lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"])
ADAPTER = random_like(
    lora.init(
        KEY, lora.LoraConfig(rank=2, targets="*"), lambda p, x: x @ p["a"] @ p["b"], PARAMS, X
    )
)
OPTIMIZERS = {
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-2, 5)),
    "chain": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)),
    "multi steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "adafactor": optax.adafactor(1e-2),
    "extra arguments": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    "no state": optax.sgd(0.1),
}


def loss(adapter):
    return ((LIFTED(lora.combine(PARAMS, adapter), X) - TARGET) ** 2).mean()


def make_step(tx):
    tx = optax.with_extra_args_support(tx)

    def step(adapter, state):
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter, value=value)
        return optax.apply_updates(adapter, updates), state

    return step


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def train(tx, *, compiled=True, adapter=ADAPTER, steps=4):
    step = make_step(tx)
    step = jax.jit(step, donate_argnums=(0, 1)) if compiled else step
    adapter = copied(adapter)
    state = tx.init(adapter)
    for _ in range(steps):
        adapter, state = step(adapter, state)
    return adapter, state


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


def kinds(state):
    """The memory kinds of arrays, and of scalars."""
    leaves = jax.tree.leaves(state)
    return tuple(
        {leaf.sharding.memory_kind for leaf in leaves if (leaf.ndim > 0) == arrays}
        for arrays in (True, False)
    )


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_are_those_without(name, compiled):
    tx = OPTIMIZERS[name]
    adapter, state = train(lora.offload(tx), compiled=compiled)
    assert_same((adapter, state), train(tx, compiled=compiled))
    arrays, scalars = kinds(state)
    assert arrays == (set() if name == "no state" else {"pinned_host"})
    assert scalars <= {"device"}
    assert kinds(adapter)[0] == {"device"}


@pytest.mark.parametrize("name", ["adamw", "chain"])
def test_a_link_of_a_chain_is_offloaded_alone(name):
    tx = optax.chain(lora.offload(OPTIMIZERS[name]), optax.trace(0.5))
    adapter, state = train(tx)
    assert_same((adapter, state), train(optax.chain(OPTIMIZERS[name], optax.trace(0.5))))
    assert kinds(state[0])[0] == {"pinned_host"}
    assert kinds(state[1])[0] == {"device"}


def test_the_compiled_step_has_the_moments_in_host_memory_and_in_place():
    tx = lora.offload(optax.adam(1e-2))
    adapter = copied(ADAPTER)
    state = tx.init(adapter)
    lowered = jax.jit(make_step(tx), donate_argnums=(0, 1)).lower(adapter, state)
    compiled = lowered.compile()
    moments = len(jax.tree.leaves(ADAPTER)) * 2
    for shardings in (compiled.input_shardings[0], compiled.output_shardings):
        placed = [sharding.memory_kind for sharding in jax.tree.leaves(shardings[1])]
        assert placed.count("pinned_host") == moments
        assert placed.count("device") == 1, "the step count"
    text = lowered.as_text().split("func.func public @main", 1)[1].splitlines()[0]
    assert text.count('mhlo.memory_kind = "pinned_host"') == 2 * moments, "arguments and results"
    size = sum(leaf.size for leaf in jax.tree.leaves(ADAPTER)) * 4
    assert compiled.memory_analysis().alias_size_in_bytes >= 3 * size
    compiled(adapter, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((adapter, state)))


def test_the_state_waits_for_the_gradients():
    """Nothing is brought to the device but in a branch on them, or XLA would do it at once."""
    tx = lora.offload(optax.adam(1e-2))
    jaxpr = jax.make_jaxpr(make_step(tx))(ADAPTER, tx.init(ADAPTER)).jaxpr
    moments = len(jax.tree.leaves(ADAPTER)) * 2
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert names.count("device_put") == moments, "back to the host, in the end"
    assert names.index("cond") < names.index("device_put")
    branch = jaxpr.eqns[names.index("cond")]
    assert len(branch.outvars) == moments
    known = {branch.invars[0]}
    for equation in reversed(jaxpr.eqns[: names.index("cond")]):
        if known & set(equation.outvars):
            known |= {v for v in equation.invars if not hasattr(v, "val")}
    assert set(jaxpr.invars[: len(jax.tree.leaves(ADAPTER))]) <= known, "it depends on gradients"


def test_a_sharded_state_keeps_its_sharding():
    over = mesh(4)
    placed = {"w": NamedSharding(over, P("model")), "v": NamedSharding(over, P(None, "model"))}
    params = jax.device_put({"w": normal("w", 8, 4), "v": normal("v", 3, 8)}, placed)
    tx = optax.adam(1e-2)

    def train(tx):
        @jax.jit
        def step(params, state):
            grads = jax.grad(lambda p: (jnp.sin(p["v"] @ p["w"]) ** 2).sum())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        trained, state = params, tx.init(params)
        for _ in range(3):
            trained, state = step(trained, state)
        return trained, state

    (plain, expected), (trained, state) = train(tx), train(lora.offload(tx))
    assert_same((trained, state), (plain, expected))
    for moment in (state[0].mu, state[0].nu):
        for name, sharding in placed.items():
            assert moment[name].sharding == sharding.with_memory_kind("pinned_host")
            assert trained[name].sharding.is_equivalent_to(sharding, 2)


def test_init_under_jit_and_without_arrays():
    tx = lora.offload(optax.adam(1e-2))
    state = tx.init(ADAPTER)
    compiled = jax.jit(tx.init)(ADAPTER)
    assert kinds(compiled) == kinds(state) == ({"pinned_host"}, {"device"})
    assert_same(compiled, state)
    shapes = jax.eval_shape(tx.init, ADAPTER)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    marked = optax.tree.map_params(tx, lambda _: "moment", state)
    assert set(jax.tree.leaves(marked[0].mu)) == {"moment"}
    assert int(marked[0].count) == 0


def test_several_adapters_at_once_and_steps_in_a_loop():
    tx, plain = lora.offload(optax.adam(1e-2)), optax.adam(1e-2)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), ADAPTER)

    def run(tx):
        state = jax.vmap(tx.init)(many)
        step = jax.vmap(make_step(tx))
        over = lambda carry, _: (step(*carry), None)  # noqa: E731
        return jax.jit(lambda *carry: jax.lax.scan(over, carry, None, length=3)[0])(many, state)

    adapters, state = run(tx)
    assert_same((adapters, state), run(plain))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state[0].mu)} == {"pinned_host"}


@pytest.mark.parametrize("apply", [True, False])
def test_a_step_is_left_out_where_it_is_told_to(apply):
    tx = lora.offload(optax.adam(1e-2))
    _, state = train(tx)
    grads = jax.tree.map(lambda leaf: leaf + (0 if apply else jnp.nan), ADAPTER)
    updates, after = jax.jit(tx.update)(grads, state, apply=jnp.array(apply))
    if apply:
        assert_same(
            (updates, after), jax.jit(optax.adam(1e-2).update)(grads, state_on_device(state))
        )
    else:
        assert_same(after, state)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert kinds(after) == ({"pinned_host"}, {"device"})


def state_on_device(state):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_with_adapter_only(outside):
    tx = optax.adam(1e-2)
    wrapped = (
        lora.offload(lora.adapter_only(tx)) if outside else lora.adapter_only(lora.offload(tx))
    )
    tree = lora.combine(PARAMS, ADAPTER)

    def run(tx):
        @jax.jit
        def step(tree, state):
            grads = jax.grad(lambda tree: ((LIFTED(tree, X) - TARGET) ** 2).mean())(tree)
            updates, state = tx.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state

        trained, state = tree, tx.init(tree)
        for _ in range(3):
            trained, state = step(trained, state)
        return trained, state

    trained, state = run(wrapped)
    assert_same((trained, state), run(lora.adapter_only(tx)))
    assert kinds(state) == ({"pinned_host"}, {"device"})
    assert len(jax.tree.leaves(state)) == 2 * len(jax.tree.leaves(ADAPTER)) + 1


def test_the_frozen_leaves_gradients_are_not_computed_to_wait_for_them():
    wide = {"a": normal("a", 128, 128), "b": normal("b", 128, 128)}
    x = normal("x", 64, 128)
    adapter = lora.init(KEY, lora.LoraConfig(rank=2, targets="*"), LIFTED, wide, x)
    tree = lora.combine(wide, adapter)

    def flops(tx):
        def step(tree, state):
            grads = jax.grad(lambda tree: (LIFTED(tree, x) ** 2).mean())(tree)
            return tx.update(grads, state, tree)

        return jax.jit(step).lower(tree, tx.init(tree)).compile().cost_analysis()["flops"]

    tx = lora.adapter_only(optax.adam(1e-2))
    frozen = 2 * (2 * 64 * 128 * 128)
    assert flops(lora.offload(tx)) < flops(tx) + 0.05 * frozen


def without_host_memory(monkeypatch):
    monkeypatch.setattr(offloading, "_memories", lambda device: ["device", "unpinned_host"])


def test_devices_without_host_memory_are_refused(monkeypatch):
    tx = lora.offload(optax.adam(1e-2))
    state = tx.init(ADAPTER)
    without_host_memory(monkeypatch)
    message = r"pinned_host.*got cpu \(cpu\), which has device, unpinned_host.*fallback=True"
    with pytest.raises(ValueError, match=message):
        tx.init(ADAPTER)
    with pytest.raises(ValueError, match=message):
        jax.jit(tx.init)(ADAPTER)
    with pytest.raises(ValueError, match=message):
        tx.update(ADAPTER, state)


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_or_keep_the_state_if_that_was_allowed(monkeypatch, compiled):
    tx = lora.offload(optax.adam(1e-2), fallback=True)
    assert kinds(train(tx, compiled=compiled)[1])[0] == {"pinned_host"}
    without_host_memory(monkeypatch)
    adapter, state = train(tx, compiled=compiled)
    assert kinds(state) == ({"device"}, {"device"})
    assert_same((adapter, state), train(optax.adam(1e-2), compiled=compiled))


def test_orbax_restores_it_into_host_memory(tmp_path):
    tx = lora.offload(optax.adam(1e-2))
    _, state = train(tx)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        again = checkpointer.restore(tmp_path / "state", like)
    assert_same(again, state)
    assert kinds(again) == ({"pinned_host"}, {"device"})

"""The step against arithmetic written out with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.training.step import init_state, make_step

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 5)).astype(np.float32)
Y = RNG.normal(size=(12,)).astype(np.float32)
# Very uneven, so that a mean of micro-batch means would be far off.
WEIGHTS = np.array([9, 0, 0, 1, 0, 0, 0, 0, 2, 7, 1, 5], np.float32)
BATCH = {"x": X, "y": Y, "weights": WEIGHTS}
BASE = RNG.normal(size=(5,)).astype(np.float32)
START = RNG.normal(size=(5,)).astype(np.float32)


def weighted_squares(adapter, params, batch, key):
    errors = batch["x"] @ (params + adapter) - batch["y"]
    return jnp.sum(batch["weights"] * errors**2), jnp.sum(batch["weights"])


def loss_and_gradient(adapter):
    errors = X @ (BASE + adapter) - Y
    return (WEIGHTS * errors**2).sum() / 25, 2 * (WEIGHTS * errors) @ X / 25


def once(tx, batch=BATCH, start=START, **options):
    state = init_state(jnp.asarray(start), tx, jax.random.key(0))
    return jax.jit(make_step(weighted_squares, tx, **options))(state, BASE, batch)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 12])
def test_one_update_is_that_of_the_weighted_mean(accumulate):
    loss, gradient = loss_and_gradient(START)
    state, metrics = once(optax.sgd(0.1), accumulate=accumulate)
    np.testing.assert_allclose(state.adapter, START - 0.1 * gradient, rtol=2e-5)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(gradient), rtol=1e-5)
    assert float(metrics.weight) == 25
    assert int(state.step) == 1


def test_the_gradient_is_clipped_and_its_own_norm_reported():
    gradient = loss_and_gradient(START)[1]
    norm = np.linalg.norm(gradient)
    state, metrics = once(optax.sgd(1.0), max_grad_norm=float(norm) / 4)
    np.testing.assert_allclose(state.adapter, START - gradient / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    untouched, _ = once(optax.sgd(1.0), max_grad_norm=float(norm) * 1.01)
    np.testing.assert_allclose(untouched.adapter, START - gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("place", [lambda tx: tx, lora.offload], ids=["device", "host"])
def test_nothing_is_updated_where_the_loss_is_not_finite(bad, accumulate, place):
    tx = place(optax.adam(0.1))
    good, _ = once(tx, accumulate=accumulate)
    kept = jax.device_get((good.adapter, good.opt_state, good.step))
    step = jax.jit(make_step(weighted_squares, tx, accumulate=accumulate, max_grad_norm=1.0))
    poisoned = {**BATCH, "y": np.where(np.arange(12) == 9, bad, Y).astype(np.float32)}
    state, metrics = step(good, BASE, poisoned)
    assert not metrics.finite
    jax.tree.map(np.testing.assert_array_equal, (state.adapter, state.opt_state, state.step), kept)
    after, metrics = step(state, BASE, BATCH)
    assert metrics.finite
    assert int(after.step) == 2


@pytest.mark.parametrize("place", [lambda tx: tx, lora.offload], ids=["device", "host"])
def test_nothing_is_updated_behind_a_step_that_failed(place):
    """Bit for bit, so that a leaf with -0.0 keeps its sign."""
    tx = place(optax.adam(0.1))
    start = np.where(np.arange(5) == 2, -0.0, START).astype(np.float32)
    step = jax.jit(make_step(weighted_squares, tx))
    state = init_state(jnp.asarray(start), tx, jax.random.key(0))
    after, metrics = step(state, BASE, BATCH, jnp.array(False))
    assert not metrics.finite
    assert np.isfinite(metrics.loss)
    np.testing.assert_array_equal(after.adapter.view(np.uint32), start.view(np.uint32))
    assert int(after.step) == 0
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    moved, metrics = step(after, BASE, BATCH, jnp.array(True))
    assert metrics.finite
    np.testing.assert_array_equal(moved.adapter, step(state, BASE, BATCH)[0].adapter)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_state_in_host_memory_changes_no_number_and_stays_there(accumulate):
    def run(tx):
        state = init_state(jnp.asarray(START), tx, jax.random.key(0))
        step = make_step(weighted_squares, tx, accumulate=accumulate, max_grad_norm=1.0)
        step, norms = jax.jit(step, donate_argnums=0), []
        for number in range(4):
            given = state
            weights = WEIGHTS * (np.nan if number == 2 else 1)
            state, metrics = step(state, BASE, {**BATCH, "weights": weights})
            norms.append(metrics.grad_norm)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        return state, norms

    tx = optax.adamw(optax.linear_schedule(0.1, 0.0, 4))
    (state, norms), (plain, expected) = run(lora.offload(tx)), run(tx)
    np.testing.assert_array_equal(norms, expected)
    for name in ("adapter", "opt_state", "step"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(plain, name))
    assert int(state.step) == 3
    assert state.adapter.sharding.memory_kind == "device"
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        assert moment.sharding.memory_kind == "pinned_host"


def test_an_optimizer_with_a_part_in_host_memory_is_refused():
    tx = optax.chain(lora.offload(optax.adam(0.1)), optax.scale(0.5))
    with pytest.raises(ValueError, match=r"state\[0\].*around the whole optimizer"):
        once(tx)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_seen():
    def loss_fn(adapter, params, batch, key):
        return jnp.sum(jnp.sqrt(adapter * 0.0)), jnp.ones(())

    tx = optax.sgd(0.1)
    state, metrics = make_step(loss_fn, tx)(
        init_state(jnp.ones(2), tx, jax.random.key(0)), None, np.zeros(1)
    )
    assert float(metrics.loss) == 0
    assert not metrics.finite
    np.testing.assert_array_equal(state.adapter, [1, 1])


def test_a_batch_without_weight_changes_nothing():
    state, metrics = once(optax.sgd(0.1), {**BATCH, "weights": np.zeros(12, np.float32)})
    np.testing.assert_array_equal(state.adapter, START)
    assert float(metrics.loss) == 0
    assert metrics.finite


def test_every_step_and_micro_batch_has_its_own_key():
    def drawn(adapter, params, batch, key):
        return adapter * jax.random.normal(key), jnp.ones(())

    tx = optax.sgd(1.0)
    step = jax.jit(make_step(drawn, tx, accumulate=2))
    state = init_state(jnp.zeros(()), tx, jax.random.key(3))
    moves = []
    for _ in range(3):
        before = state.adapter
        state, _ = step(state, None, np.zeros((2, 1)))
        moves.append(float(state.adapter - before))
    expected = [
        -np.mean([float(jax.random.normal(k)) for k in
                  jax.random.split(jax.random.fold_in(jax.random.key(3), n), 2)])
        for n in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(moves, expected, rtol=1e-4)


def test_the_state_is_donated_and_nothing_else():
    tx = optax.adam(0.1)
    adapter, params = jnp.asarray(START), jnp.asarray(BASE)
    state = init_state(adapter, tx, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, BATCH)
    compiled = (
        jax.jit(make_step(weighted_squares, tx), donate_argnums=0)
        .lower(state, params, batch)
        .compile()
    )
    compiled(state, params, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.adapter, state.opt_state)))
    for kept in (adapter, params, *batch.values()):
        assert not kept.is_deleted()
    # Adapter, both moments, the counters and the key live on in place.
    assert compiled.memory_analysis().alias_size_in_bytes >= 3 * 5 * 4


def test_it_trains_a_lifted_function_and_leaves_the_base_alone():
    def fn(params, x):
        return jnp.tanh(x @ params["w1"]) @ params["w2"]

    keys = jax.random.split(jax.random.key(1), 3)
    params = {"w1": jax.random.normal(keys[0], (8, 16)), "w2": jax.random.normal(keys[1], (16, 4))}
    before = jax.device_get(params)
    x = jax.random.normal(keys[2], (32, 8))
    wanted = jnp.roll(fn(params, x), 1, axis=1)
    adapter = lora.init(jax.random.key(2), lora.LoraConfig(rank=1), fn, params, x)
    apply = lora.lift(fn)

    def loss_fn(adapter, params, batch, key):
        return jnp.sum((apply(lora.combine(params, adapter), batch[0]) - batch[1]) ** 2), 32.0

    tx = optax.adam(3e-2)
    step = jax.jit(make_step(loss_fn, tx, max_grad_norm=10.0), donate_argnums=0)
    state, losses = init_state(adapter, tx, jax.random.key(0)), []
    for _ in range(150):
        state, metrics = step(state, params, (x, wanted))
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses[0], np.sum((fn(before, x) - wanted) ** 2) / 32, rtol=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, params, before)
    merged = lora.merge(params, state.adapter)
    after = np.sum((fn(merged, x) - wanted) ** 2) / 32
    assert after == pytest.approx(losses[-1], rel=0.05)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"accumulate: expected at least 1, got 0"):
        make_step(weighted_squares, optax.sgd(1.0), accumulate=0)
    with pytest.raises(ValueError, match=r"max_grad_norm: expected a positive number"):
        make_step(weighted_squares, optax.sgd(1.0), max_grad_norm=0)
    with pytest.raises(ValueError, match=r"accumulate=5 divides, got shape \(12"):
        once(optax.sgd(1.0), accumulate=5)

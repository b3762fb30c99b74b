"""LoftQ and PiSSA: against the papers' alternation, written out in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import Format
from lora_jax.quantization.quantized import quantize_array

from .cases import normal

RANK, SCALE = 4, 3.0


def setup(layers=()):
    params = {"w": 0.1 * normal("w", *layers, 64, 48), "back": 0.1 * normal("b", 48, 64)}

    def fn(p, x):
        layer = lambda x, w: (x + jnp.tanh(x @ w) @ p["back"], None)  # noqa: E731
        return jax.lax.scan(layer, x, p["w"])[0] if layers else layer(x, p["w"])[0]

    x = normal("x", 5, 64)
    base = lora.quantize(fn, params, x, targets="w")
    config = lora.LoraConfig(rank=RANK, alpha=RANK * SCALE, targets="w")
    adapter = lora.init(jax.random.key(0), config, fn, base, x)
    return fn, params, x, base, adapter


def rounded(matrix):
    stored = quantize_array(np.float32(matrix), Axes((), (0,), (1,)), Format())
    return np.asarray(stored.form("float32"), np.float64)


def nearest(matrix):
    u, s, vt = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


def loftq_by_hand(w, iterations):
    low = np.zeros(w.shape)
    for _ in range(iterations):
        base = rounded(w - low)
        low = nearest(w - base)
    return base, low


def pissa_by_hand(w, iterations):
    low = nearest(w)
    base = rounded(w - low)
    for _ in range(iterations - 1):
        low = nearest(w - base)
        base = rounded(w - low)
    return base, low


@pytest.mark.parametrize("layers", [(), (3,)], ids=["one", "stack"])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(
    ("start", "by_hand"), [(lora.loftq, loftq_by_hand), (lora.pissa, pissa_by_hand)]
)
def test_the_alternation(start, by_hand, iterations, layers):
    _, params, _, base, adapter = setup(layers)
    stored, started = start(params, base, adapter, iterations=iterations)
    update = started["w"]
    delta = SCALE * np.asarray(update.lora_a) @ np.asarray(update.lora_b)
    formed = np.asarray(stored["w"].form("float32"))
    for w, got, low in zip(
        *(np.asarray(each).reshape(-1, 64, 48) for each in (params["w"], formed, delta)),
        strict=True,
    ):
        want, want_low = by_hand(w, iterations)
        # A value between two codes may fall to either after float32's rounding.
        assert np.mean(np.abs(got - want) > 1e-5) < 0.002
        np.testing.assert_allclose(low, want_low, atol=2e-2 * np.abs(want_low).max())
    # Balanced: A and B have the same norms, so that neither learns faster.
    norms = [np.linalg.norm(leaf, axis=axis) for leaf, axis in ((update.lora_a, -2),
                                                              (update.lora_b, -1))]  # fmt: skip
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-3)


def test_both_start_nearer_to_the_full_model_than_the_quantized_one():
    fn, params, x, base, adapter = setup((3,))
    lifted = lora.lift(fn)

    def weights(base, adapter):
        return np.linalg.norm(params["w"] - lora.merge(base, adapter)["w"])

    def outputs(base, adapter):
        return np.linalg.norm(lifted(lora.combine(base, adapter), x) - fn(params, x))

    for start in (lora.loftq, lora.pissa):
        near = start(params, base, adapter, iterations=5)
        assert weights(*near) < 0.93 * weights(base, adapter)
        assert outputs(*near) < outputs(base, adapter)
    ranks = []
    for rank in (2, 8, 23):
        config = lora.LoraConfig(rank=rank, targets="w")
        wider = lora.init(jax.random.key(0), config, fn, base, x)
        ranks.append(weights(*lora.loftq(params, base, wider)))
    assert ranks[0] > ranks[1] > ranks[2]


def test_other_leaves_and_settings_stay():
    fn, params, x, base, _ = setup()
    config = lora.LoraConfig(rank=2, targets=("w", "back"), dropout_rate=0.1, dtype="bfloat16")
    adapter = lora.init(jax.random.key(0), config, fn, base, x)
    stored, started = lora.loftq(params, base, adapter)
    assert stored["back"] is params["back"]
    assert started["back"] is adapter["back"]
    assert jax.tree.structure(started) == jax.tree.structure(adapter)
    assert started["w"].lora_a.dtype == jnp.bfloat16
    assert started["w"].dropout_rate == 0.1


def test_a_looked_up_table():
    """Its blocks lie along its rows, its update goes from row to columns."""
    fn = lambda p, ids: jnp.tanh(p["t"][ids])  # noqa: E731
    params, ids = {"t": normal("t", 80, 64)}, jnp.array([1, 79])
    base = lora.quantize(fn, params, ids, targets="t")
    config = lora.LoraConfig(rank=4, targets="t")
    adapter = lora.init(jax.random.key(0), config, fn, base, ids)
    near = lora.loftq(params, base, adapter)
    errors = [np.linalg.norm(params["t"] - lora.merge(*each)["t"]) for each in
              ((base, adapter), near)]  # fmt: skip
    assert errors[1] < 0.93 * errors[0]
    got = lora.lift(fn)(lora.combine(*near), ids)
    np.testing.assert_allclose(got, fn(lora.merge(*near), ids), atol=2e-2)


def test_bad_input():
    _, params, _, base, adapter = setup()
    with pytest.raises(ValueError, match=r"loftq: iterations: expected at least 1, got 0"):
        lora.loftq(params, base, adapter, iterations=0)
    with pytest.raises(ValueError, match=r"pissa: none of the adapter's 1 weights is quantized"):
        lora.pissa(params, params, adapter)
    with pytest.raises(ValueError, match=r"w: the adapter updates a weight of shape \(64, 48\)"):
        lora.loftq({**params, "w": params["w"][:32]}, base, adapter)
    for wrong in (base, jax.eval_shape(lambda: params)):
        with pytest.raises(ValueError, match=r"w: loftq: expected the full weight, got a (Q|S)"):
            lora.loftq(wrong, base, adapter)
    bad = {**params, "w": params["w"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"w: cannot be quantized: 1 of its 3072 values"):
        lora.loftq(bad, base, adapter)

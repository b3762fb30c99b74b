"""The stored form of quantized weights: against the format's arithmetic, written out in NumPy."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import (
    FP4,
    NF4,
    Format,
    dequantize_scales,
    dynamic_map,
    quantize_scales,
)
from lora_jax.quantization.quantized import quantize_array

from .cases import normal

CODES = {"nf4": np.float32(NF4), "fp4": np.float32(FP4)}
PLAIN = Axes((), (0,), (1,))


def by_hand(rows: np.ndarray, name: str, block: int) -> np.ndarray:
    """The values that `[out, in]` is rounded to, block by block."""
    out = np.zeros_like(rows)
    for o in range(rows.shape[0]):
        for start in range(0, rows.shape[1], block):
            piece = rows[o, start : start + block]
            absmax = np.abs(piece).max()
            if absmax == 0:
                continue
            distances = np.abs(piece[:, None] / absmax - CODES[name][None])
            out[o, start : start + block] = CODES[name][distances.argmin(1)] * absmax
    return out


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 3), (70, 5), (1, 4), (129, 2)])
@pytest.mark.parametrize("block", [32, 64])
def test_values_are_the_nearest_codes_of_each_block(name, shape, block):
    w = np.asarray(normal("w", *shape))
    stored = quantize_array(w, PLAIN, Format(name, block, double_quant=False))
    want = by_hand(w.T, name, block).T
    np.testing.assert_allclose(stored.form("float32"), want, rtol=1e-6, atol=0)


def test_int8_has_one_scale_for_each_output():
    w = np.asarray(normal("w", 70, 5)) * np.float32([1, 10, 0, 1e-3, 5])
    stored = quantize_array(w, PLAIN, Format("int8"))
    scales = np.abs(w).max(0) / 127
    steps = np.round(w / np.where(scales > 0, scales, 1))
    np.testing.assert_array_equal(stored.codes, steps.astype(np.int8))
    np.testing.assert_allclose(stored.form("float32"), steps * scales, rtol=1e-6)


def test_double_quantization_rounds_the_scales_less_their_mean():
    scales = np.abs(np.asarray(normal("s", 600))) + 0.5
    codes, absmax, mean = quantize_scales(jnp.asarray(scales))
    assert absmax.shape == (3,)
    assert codes.dtype == jnp.uint8
    np.testing.assert_allclose(mean, scales.mean(), rtol=1e-6)
    got = dequantize_scales(codes, absmax, mean)
    for start in range(0, 600, 256):
        piece = scales[start : start + 256] - scales.mean()
        largest = np.abs(piece).max()
        distances = np.abs(piece[:, None] / largest - dynamic_map()[None])
        nearest = dynamic_map()[distances.argmin(1)] * largest + scales.mean()
        np.testing.assert_allclose(got[start : start + 256], nearest, rtol=2e-5)


def test_the_dynamic_map_is_the_published_one():
    values = dynamic_map()
    assert len(set(values.tolist())) == 256
    assert values[127] == 0
    assert values[255] == 1
    np.testing.assert_allclose(values[0], -0.99297, atol=1e-5)
    np.testing.assert_allclose(values[126], -values[128])
    # The top decade has 64 evenly spaced means of the 65 edges from 0.1 to 1.
    edges = np.linspace(0.1, 1, 65)
    np.testing.assert_allclose(values[-65:-1], (edges[1:] + edges[:-1]) / 2, rtol=1e-6)


axes_of = {
    "several in and out": ((4, 32, 3, 5), Axes((), (0, 1), (2, 3))),
    "interleaved": ((3, 33, 2, 4), Axes((0,), (1, 3), (2,))),
    "stack behind": ((40, 6, 3), Axes((2,), (0,), (1,))),
    "two stacks": ((2, 3, 65, 4), Axes((0, 1), (2,), (3,))),
    "no out": ((64,), Axes((), (0,), ())),
}


@pytest.mark.parametrize(("shape", "axes"), axes_of.values(), ids=axes_of)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_any_axes_are_each_matrix_for_itself(shape, axes, name, double):
    w = np.asarray(normal("w", *shape))
    format = Format(name, 32, double)
    formed = np.asarray(quantize_array(w, axes, format).form("float32"))
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    batch = [shape[a] for a in axes.batch]
    fan_in = int(np.prod([shape[a] for a in axes.inputs]))
    matrices = w.transpose(order).reshape(-1, fan_in, w.size // fan_in // int(np.prod(batch)))
    formed = formed.transpose(order).reshape(matrices.shape)
    for matrix, got in zip(matrices, formed, strict=True):
        want = quantize_array(matrix, PLAIN, format).form("float32")
        # Up to the order in which the mean of the scales is summed.
        np.testing.assert_allclose(got, want, rtol=1e-6)


@hypothesis.given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 6)),
    block=st.sampled_from([32, 64]),
    double=st.booleans(),
    name=st.sampled_from(["nf4", "fp4", "int8"]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
def test_rounding_is_bounded_and_done_twice_changes_nothing(
    shape, block, double, name, exponent, seed
):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2.0**exponent
    stored = quantize_array(w, PLAIN, Format(name, block, double), compute_dtype="float32")
    formed = np.asarray(stored.form())
    assert formed.shape == w.shape
    assert np.isfinite(formed).all()
    # Half the widest gap of the codes, and what the scales lost.
    half_gap = {"nf4": 0.152, "fp4": 0.167, "int8": 0.004}[name]
    bound = np.abs(w).max() * (half_gap + 0.03 * double)
    assert np.abs(formed - w).max() <= bound
    if not double:
        again = np.asarray(stored.again(formed).form())
        np.testing.assert_allclose(again, formed, rtol=1e-5, atol=0)


def test_padding_never_shows():
    """Zeros beside the values change no block's scale, and are cut off again."""
    w = np.asarray(normal("w", 65, 3))
    stored = quantize_array(w, PLAIN, Format(double_quant=False))
    assert stored.codes.shape == (64, 3)
    np.testing.assert_allclose(stored.form("float32")[64], w[64], rtol=1e-6)  # Its own block.
    assert stored.size == w.size
    assert stored.shape == w.shape


def test_quantize_finds_axes_and_leaves_the_rest_alone():
    def fn(params, tokens):
        x = params["embed"][tokens] * params["norm"]
        x = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["layers"])[0]
        return x @ params["head"] + params["bias"], params["count"]

    params = {
        "embed": normal("e", 10, 32), "norm": normal("n", 32), "layers": normal("l", 3, 32, 32),
        "head": normal("h", 32, 7), "bias": normal("b", 7), "count": jnp.arange(3),
    }  # fmt: skip
    stored = lora.quantize(fn, params, jnp.array([1, 2]))
    kinds = {name for name, leaf in stored.items() if isinstance(leaf, lora.Quantized)}
    assert kinds == {"layers", "head"}
    assert str(stored["layers"].axes) == "batch, in, out"
    assert stored["layers"].path == "layers"
    assert stored["embed"] is params["embed"]
    abstract = jax.eval_shape(lambda: params)
    planned = lora.quantize(fn, abstract, jnp.array([1, 2]))
    assert jax.tree.structure(planned) == jax.tree.structure(stored)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), stored)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == shapes
    # A table that is asked for is quantized along its rows.
    table = lora.quantize(fn, params, jnp.array([1, 2]), targets="embed", block_size=32)["embed"]
    want = quantize_array(params["embed"].T, PLAIN, Format(block_size=32)).form("float32").T
    np.testing.assert_array_equal(table.form("float32"), want)


def test_dequantize_gives_back_dtypes_and_plain_arrays():
    fn = lambda p, x: x @ p["a"] + x @ p["b"]  # noqa: E731
    params = {"a": normal("a", 64, 4).astype(jnp.bfloat16), "b": normal("b", 64, 4)}
    stored = lora.quantize(fn, params, normal("x", 2, 64), targets="a")
    plain = lora.dequantize(stored)
    assert plain["a"].dtype == jnp.bfloat16
    assert plain["b"] is params["b"]
    np.testing.assert_array_equal(plain["a"], stored["a"].form("float32").astype(jnp.bfloat16))
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=1), fn, stored, normal("x", 2, 64))
    combined = lora.dequantize(lora.combine(stored, adapter))
    assert lora.split(combined)[1].keys() == adapter.keys()
    np.testing.assert_array_equal(lora.split(combined)[0]["a"], plain["a"])


def small():
    fn = lambda p, x: jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]  # noqa: E731
    params = {
        "a": {"kernel": normal("a", 64, 32), "bias": normal("bias", 32)},
        "b": {"kernel": normal("b", 32, 8)},
    }
    return fn, params, normal("x", 3, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "*/bias"}, r"a/bias: selected by quantize's targets, but .* never multiplies"),
        ({"targets": "*/nothing"}, r"quantize: targets: the pattern '\*/nothing' matches none"),
        ({"targets": ()}, r"quantize: targets: expected glob patterns, got \(\)"),
        ({"exclude": "*/nothing"}, r"quantize: exclude: the pattern"),
        ({"exclude": "*"}, r"of 3 parameters, 0 are quantized or adapted"),
        ({"block_size": 48}, r"block_size: expected a power of two from 32 to 4096, got 48"),
        ({"block_size": 8192}, r"block_size: expected a power of two from 32 to 4096, got 8192"),
        ({"block_size": 16}, r"got 16"),
        ({"block_size": 64.0}, r"got 64.0"),
        ({"format": "int3"}, r"format: expected one of \('nf4', 'fp4', 'int8'\), got 'int3'"),
        ({"compute_dtype": "int8"}, r"compute_dtype: expected a floating-point dtype, got 'int8'"),
        ({"compute_dtype": "bf17"}, r"compute_dtype: expected a floating-point dtype, got 'bf17'"),
    ],
)
def test_bad_options(options, message):
    fn, params, x = small()
    with pytest.raises(ValueError, match=message):
        lora.quantize(fn, params, x, **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_and_counted(bad):
    fn, params, x = small()
    params["b"]["kernel"] = params["b"]["kernel"].at[3, :2].set(bad)
    with pytest.raises(ValueError, match=r"b/kernel: cannot be quantized: 2 of its 256 values"):
        lora.quantize(fn, params, x)


def test_a_value_whose_inverse_float32_does_not_have_is_refused():
    fn, params, x = small()
    params["b"]["kernel"] = params["b"]["kernel"].at[3, 3].set(1e38)
    with pytest.raises(ValueError, match=r"b/kernel: .* 1 of its 256 values .* above 8e\+37"):
        lora.quantize(fn, params, x)
    params["b"]["kernel"] = params["b"]["kernel"].at[3, 3].set(7e37)
    formed = lora.dequantize(lora.quantize(fn, params, x))["b"]["kernel"]
    np.testing.assert_allclose(formed[3, 3], 7e37, rtol=0.02)


def test_an_empty_weight_is_left_out_or_named():
    fn = lambda p, x: x @ p["w"] @ p["none"]  # noqa: E731
    params, x = {"w": normal("w", 64, 8), "none": jnp.zeros((8, 0))}, normal("x", 2, 64)
    assert lora.quantize(fn, params, x)["none"] is params["none"]
    with pytest.raises(ValueError, match=r"none: .* at least one element, got shape \(8, 0\)"):
        lora.quantize(fn, params, x, targets="none")


def test_arrays_cut_or_cast_by_themselves_are_named():
    """Outside of `lift` nothing tells the weight that its arrays are others now."""
    fn = lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]  # noqa: E731
    x = normal("x", 2, 64)
    stored = lora.quantize(fn, {"w": normal("w", 3, 64, 64)}, x)
    one = lambda p, x: x @ p["w"]  # noqa: E731
    cut = jax.tree.map(lambda leaf: leaf[0], stored)
    with pytest.raises(ValueError, match=r"w: .* cut or cast .* float32\[3, 64, 64\], but its co"):
        lora.lift(one)(cut, x)
    with pytest.raises(ValueError, match=r"w: .* its codes are uint8\[32, 64\]"):
        lora.dequantize(cut)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stored)
    with pytest.raises(ValueError, match=r"w: .* its codes are bfloat16\[3, 32, 64\]"):
        lora.lift(fn)(cast, x)


def test_a_weight_that_is_not_floating_is_named():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": jnp.ones((64, 4), jnp.int32)}
    with pytest.raises(ValueError, match=r"w: cannot be quantized: expected floating.* got int32"):
        lora.quantize(fn, params, jnp.ones((2, 64), jnp.int32), targets="w")


def test_quantized_twice_or_under_an_adapter_raises():
    fn, params, x = small()
    stored = lora.quantize(fn, params, x, targets="b/kernel")
    with pytest.raises(ValueError, match=r"b/kernel: is a Quantized already"):
        lora.quantize(fn, stored, x, targets="b/kernel")
    rest = lora.quantize(fn, stored, x)  # "*" takes what is left.
    assert rest["b"]["kernel"] is stored["b"]["kernel"]
    assert isinstance(rest["a"]["kernel"], lora.Quantized)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2), fn, params, x)
    with pytest.raises(ValueError, match=r"a/kernel: is a Adapted already|is an Adapted already"):
        lora.quantize(fn, lora.combine(params, adapter), x, targets="a/kernel")


def test_merge_goes_through_float32_and_requantizes_on_demand():
    fn, params, x = small()
    stored = lora.quantize(fn, params, x, compute_dtype="float32")
    config = lora.LoraConfig(rank=2, targets="a/kernel")
    adapter = lora.init(jax.random.key(0), config, fn, stored, x)
    a, b = adapter["a/kernel"].lora_a, normal("lora_b", 2, 32)
    adapter["a/kernel"] = lora.init(jax.random.key(0), config, fn, stored, x)["a/kernel"]
    adapter = jax.tree.map(lambda leaf: b if leaf.shape == b.shape else leaf, adapter)
    update = adapter["a/kernel"]
    want = np.asarray(stored["a"]["kernel"].form("float32")) + update.scale * np.asarray(a) @ b
    merged = lora.merge(stored, adapter)
    np.testing.assert_allclose(merged["a"]["kernel"], want, rtol=1e-5, atol=1e-6)
    # Plain arrays all through, for the model as it is.
    np.testing.assert_array_equal(merged["b"]["kernel"], stored["b"]["kernel"].form("float32"))
    both = lora.switch(stored, {"task": adapter}, "task"), lora.switch(stored, {}, None)
    jax.tree.map(np.testing.assert_array_equal, both[0], merged)
    jax.tree.map(np.testing.assert_array_equal, both[1], lora.dequantize(stored))
    again = lora.merge(stored, adapter, requantize=True)
    assert again["b"]["kernel"] is stored["b"]["kernel"]
    np.testing.assert_array_equal(
        again["a"]["kernel"].codes,
        quantize_array(merged["a"]["kernel"], PLAIN, Format()).codes,
    )
    with pytest.raises(ValueError, match=r"a/kernel: expected a plain array, got a quantized"):
        lora.unmerge(again, adapter)
    np.testing.assert_allclose(
        lora.unmerge(merged, adapter)["a"]["kernel"], stored["a"]["kernel"].form(), atol=1e-5
    )


def test_an_update_that_is_not_finite_cannot_be_requantized():
    fn, params, x = small()
    stored = lora.quantize(fn, params, x)
    config = lora.LoraConfig(rank=2, targets="a/kernel")
    adapter = lora.init(jax.random.key(0), config, fn, stored, x)
    adapter = jax.tree.map(lambda leaf: leaf + jnp.nan, adapter)
    with pytest.raises(ValueError, match=r"^a/kernel: cannot be quantized: 2048 of its 2048"):
        lora.merge(stored, adapter, requantize=True)


def test_trained_whole_needs_an_array():
    fn, params, x = small()
    stored = lora.quantize(fn, params, x)
    config = lora.LoraConfig(rank=2, targets="a/kernel", trainable=("b/kernel",))
    with pytest.raises(
        ValueError, match=r"b/kernel: trained whole, .* it is quantized.* leave it out of `q"
    ):
        lora.init(jax.random.key(0), config, fn, stored, x)


def test_summary_counts_bits_and_bytes():
    fn, params, x = small()
    stored = lora.quantize(fn, params, x, double_quant=False)
    adapter = lora.init(
        jax.random.key(0), lora.LoraConfig(rank=2, targets="a/kernel"), fn, stored, x
    )
    summary = lora.summary(stored, adapter)
    # Half a byte an element and a float32 for each of 32 outputs; the kernel of 32 inputs is padded
    # to a block of 64.
    a, b = 64 * 32 // 2 + 32 * 4, 64 * 8 // 2 + 8 * 4
    assert summary.nbytes == a + b + 32 * 4
    assert summary.total == 64 * 32 + 32 + 32 * 8
    rows = {row.path: row for row in summary.rows}
    assert rows["a/kernel"].bits == 4.5
    assert rows["a/kernel"].trainable == 2 * (64 + 32)
    assert rows["b/kernel"].bits == 9
    assert rows["b/kernel"].trainable == 0
    assert "  4.5  " in str(summary)
    assert "The base takes 0.002 MB" in str(summary)


def test_checkpoint_knows_a_quantized_base(tmp_path):
    fn, params, x = small()
    stored = lora.quantize(fn, params, x)
    config = lora.LoraConfig(rank=2)
    adapter = lora.init(jax.random.key(0), config, fn, stored, x)
    lora.save(tmp_path / "a", adapter, config, stored)
    restored, _ = lora.restore(tmp_path / "a", stored)
    jax.tree.map(np.testing.assert_array_equal, restored, adapter)
    with pytest.raises(ValueError, match=r"a/kernel: expected nf4, .* got plain numbers"):
        lora.restore(tmp_path / "a", params)
    other = lora.quantize(fn, params, x, format="fp4")
    with pytest.raises(ValueError, match=r"a/kernel: expected nf4, .* got fp4, blocks of 64"):
        lora.restore(tmp_path / "a", other)
    changed = lora.quantize(fn, jax.tree.map(lambda w: w * 1.5, params), x)
    with pytest.raises(ValueError, match=r"the values differ"):
        lora.restore(tmp_path / "a", changed)


def test_orbax_saves_a_quantized_base_like_any_tree(tmp_path):
    import orbax.checkpoint as ocp

    fn, params, x = small()
    stored = lora.quantize(fn, params, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", stored)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "base", jax.eval_shape(lambda: stored))
    assert jax.tree.structure(back) == jax.tree.structure(stored)
    jax.tree.map(np.testing.assert_array_equal, back, stored)


def test_codes_and_scales_follow_a_sharding():
    """Made from a sharded weight, or placed by `partition`, and used by a sharded product."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    w, x = normal("w", 3, 128, 8), normal("x", 4, 128)
    stack = lambda p, x: jax.lax.scan(lambda c, v: (c + (x @ v).sum(), None), 0.0, p["w"])[0]  # noqa: E731
    want_base = lora.quantize(stack, {"w": w}, x, compute_dtype="float32")
    want = jax.jit(lora.lift(stack))(want_base, x)
    for spec in (P(None, None, "model"), P(None, "model"), P(None, "data", "model")):
        specs = want_base["w"].partition(spec)
        place = lambda array, s: jax.device_put(array, NamedSharding(mesh, s))  # noqa: E731
        placed = {"w": jax.tree.map(place, want_base["w"], specs)}
        assert placed["w"].codes.sharding.spec == specs.codes
        got = jax.jit(lora.lift(stack))(placed, jax.device_put(x, NamedSharding(mesh, P())))
        np.testing.assert_allclose(got, want, rtol=1e-5)
        sharded = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
        made = lora.quantize(stack, sharded, x, compute_dtype="float32")
        np.testing.assert_array_equal(made["w"].codes, want_base["w"].codes)
    assert fn is not None

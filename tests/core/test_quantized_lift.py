"""Every case on a 4-bit base, with an adapter and without, against plain arrays."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lora

from .cases import CASES, cast, mesh, normal, random_like
from .table import assert_close, scalar

pytestmark = pytest.mark.usefixtures("quick_compilation")


def both(case, *, compute_dtype="float32", dtype=None, **options):
    """The lifted function on a 4-bit base, and the plain one on the same numbers as arrays."""
    fn, params, args, adapter = case.setup(dtype)
    base = lora.quantize(
        fn, params, *args, targets=tuple(adapter), block_size=32, compute_dtype=compute_dtype
    )
    dense, lifted = lora.dequantize(base), lora.lift(fn, **options)
    return (
        lambda adapter: lifted(lora.combine(base, adapter), *args),
        lambda adapter: fn(lora.merge(dense, adapter), *args),
        adapter,
    )


covered = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if not c.forms_base], ids=lambda case: case.name
)


@covered
def test_jit_grad_and_no_adapter(case):
    lifted, plain, adapter = both(case)

    def everything(f, adapter):
        return f({}), f(adapter), jax.grad(lambda a: scalar(f(a)))(adapter)

    bare, out, grad = jax.jit(lambda a: everything(lifted, a))(adapter)
    bare_, out_, grad_ = jax.jit(lambda a: everything(plain, a))(adapter)
    assert_close(bare, bare_)
    assert_close(out, out_)
    assert_close(grad, grad_, 2e-4)


@pytest.mark.parametrize(
    "name",
    [
        "matmul", "interleaved_axes", "used_twice", "experts", "expert_for_each_row",
        "conv_2d_dilated", "embedding_tied_to_the_head", "scan_over_layers", "cond",
        "linen_scan_remat", "nnx_attention",
    ],
)  # fmt: skip
def test_vmap_over_stacked_adapters_under_checkpoint(name):
    """One of each kind: how the base is formed does not depend on the adapter's axes."""
    case = CASES[name]
    lifted, plain, adapter = both(case)
    adapters = [random_like(adapter, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    derivative = jax.grad(jax.checkpoint(lambda a: scalar(lifted(a))))
    got = jax.jit(jax.vmap(derivative))(stacked)
    one = jax.jit(jax.grad(lambda a: scalar(plain(a))))
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, adapters))
    assert_close(got, want, 2e-4)


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if "/" in str(c.axes)], ids=lambda case: case.name
)
def test_bfloat16(case):
    """As models use it: in bfloat16 throughout, weights formed in bfloat16."""
    fn, params, args, adapter = case.setup(jnp.bfloat16)
    base = lora.quantize(fn, params, *args, targets=tuple(adapter), block_size=32)
    got = eqx.filter_jit(lora.lift(fn))(lora.combine(base, adapter), *args)
    wide, wide_args = cast((lora.dequantize(base), args), jnp.float32)
    want = eqx.filter_jit(fn)(lora.merge(wide, adapter), *wide_args)
    assert_close(got, want, 24 * float(jnp.finfo(jnp.bfloat16).eps))


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.forms_base], ids=lambda case: case.name
)
def test_what_would_form_the_base_raises_unless_allowed(case):
    lifted, _, adapter = both(case)
    with pytest.raises(ValueError, match=r"w: .* needs the adapted and quantized weight as one"):
        lifted(adapter)
    with pytest.raises(ValueError, match=r"w: .* needs the quantized weight as one dense"):
        lifted({})
    allowed, plain, _ = both(case, dense="allow")
    assert_close(allowed(adapter), plain(adapter))


def test_shard_map_splits_codes_along_out_and_whole_blocks():
    w, x = normal("w", 128, 6), normal("x", 5, 128)

    def along_in(w, x):
        product = lambda w, x: jax.lax.psum(x @ w, "model")  # noqa: E731
        specs = (P("model"), P(None, "model"))
        return jax.shard_map(product, mesh=mesh(), in_specs=specs, out_specs=P())(w, x)

    def along_out(w, x):
        product = lambda w, x: x @ (w * 2)  # noqa: E731
        specs = (P(None, "model"), P())
        return jax.shard_map(product, mesh=mesh(), in_specs=specs, out_specs=P(None, "model"))(w, x)

    def gathered(w, x):
        product = lambda w, x: x @ jax.lax.all_gather(w, "model", axis=0, tiled=True)  # noqa: E731
        return jax.shard_map(
            product, mesh=mesh(), in_specs=(P("model"), P()), out_specs=P(), check_vma=False
        )(w, x)

    for fn in (along_in, along_out, gathered):
        base = lora.quantize(fn, w, x, compute_dtype="float32")
        got = jax.jit(lora.lift(fn))(base, x)
        assert_close(got, fn(lora.dequantize(base), x))


def test_scan_cuts_the_codes_and_not_the_dense_stack():
    """A transposed, cast and scaled stack is still cut layer by layer."""

    def fn(w, x):
        stack = (w.transpose(1, 0, 2) * 0.5).astype(jnp.bfloat16)
        return jax.lax.scan(lambda c, v: (jnp.tanh(c @ v.astype(c.dtype)), None), x, stack)[0]

    w, x = normal("w", 64, 3, 64), normal("x", 5, 64)
    base = lora.quantize(fn, w, x)
    lifted = jax.jit(lora.lift(fn)).lower(base, x)
    sizes = {np.prod(shape) for shape in shapes_made(jax.make_jaxpr(lora.lift(fn))(base, x).jaxpr)}
    assert 64 * 64 in sizes
    assert 3 * 64 * 64 not in sizes
    assert_close(lifted.compile()(base, x), fn(lora.dequantize(base), x), 1e-2)


def shapes_made(jaxpr):
    """Shapes of all that is computed, in nested functions too."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_made(inner)


def test_a_lookup_forms_the_rows_it_takes_and_no_others():
    params, ids = {"t": normal("w", 500, 64)}, jnp.array([[0, 3], [499, 3]])
    fn = lambda p, ids: p["t"][ids]  # noqa: E731
    base = lora.quantize(fn, params, ids, targets="t", compute_dtype="float32")
    lifted = lora.lift(fn)
    sizes = {np.prod(shape) for shape in shapes_made(jax.make_jaxpr(lifted)(base, ids).jaxpr)}
    assert max(sizes) < 500 * 64 / 2
    np.testing.assert_array_equal(lifted(base, ids), fn(lora.dequantize(base), ids))


def test_out_of_range_rows_are_nan_as_in_jax():
    fn = lambda p, ids: jnp.take(p["t"], ids, axis=0)  # noqa: E731
    params, ids = {"t": normal("w", 40, 64)}, jnp.array([3, 40])
    base = lora.quantize(fn, params, ids, targets="t")
    got = lora.lift(fn)(base, ids)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1]).all()


def test_the_backward_pass_keeps_no_dense_weight():
    def fn(w, x):
        return jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, w)[0]

    w, x = normal("w", 3, 64, 64), normal("x", 5, 64)
    base = lora.quantize(fn, w, x)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2), fn, base, x)
    lifted = lora.lift(fn)
    _, pull = jax.vjp(lambda a: lifted(lora.combine(base, a), x), adapter)
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(leaf.size for leaf in kept) < 64 * 64
    assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(pull))


def test_an_unchanged_quantized_weight_comes_back_as_it_went_in():
    fn = lambda p, x: (p, x @ p["w"])  # noqa: E731
    base = lora.quantize(fn, {"w": normal("w", 64, 8)}, normal("x", 5, 64))
    returned, _ = lora.lift(fn)(base, normal("x", 5, 64))
    assert returned["w"] is base["w"]


def test_grad_of_one_tree_gives_the_codes_no_gradient():
    """One-tree code: codes are integers, so JAX wants to be told."""
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = normal("x", 5, 64)
    base = lora.quantize(fn, {"w": normal("w", 64, 64)}, x)
    adapter = random_like(lora.init(jax.random.key(0), lora.LoraConfig(rank=2), fn, base, x))
    tree = lora.combine(base, adapter)
    grads = jax.grad(lambda t: scalar(lora.lift(fn)(t, x)), allow_int=True)(tree)
    want = jax.grad(lambda a: scalar(lora.lift(fn)(lora.combine(base, a), x)))(adapter)
    assert_close(lora.split(grads)[1], want)
    still = [g for g in jax.tree.leaves(grads["w"].base) if g.dtype != jax.dtypes.float0]
    assert all(not np.any(leaf) for leaf in still)

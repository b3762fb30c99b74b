"""Every case through every transformation, against the same function on merged weights."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

from .cases import cast, random_like
from .table import assert_close, cases, scalar

pytestmark = pytest.mark.usefixtures("quick_compilation")


def both(case, **options):
    """The lifted function and the plain one on merged weights, as functions of the adapter."""
    fn, params, args, adapter = case.setup(**options)
    lifted = lora.lift(fn)
    return (
        lambda adapter: lifted(lora.combine(params, adapter), *args),
        lambda adapter: fn(lora.merge(params, adapter), *args),
        adapter,
    )


@cases
def test_axes(case):
    *_, adapter = case.setup()
    if case.axes is not None:
        assert {path: str(update.axes) for path, update in adapter.items()} == case.axes
    for update in adapter.values():
        a, b, axes = update.lora_a, update.lora_b, update.axes
        shape = update.shape
        assert a.shape == (*(shape[i] for i in (*axes.batch, *axes.inputs)), case.rank)
        assert b.shape == (
            *(shape[i] for i in axes.batch), case.rank, *(shape[i] for i in axes.outputs)
        )  # fmt: skip


@cases
def test_jit_grad_and_jvp(case):
    lifted, plain, adapter = both(case)
    direction = random_like(adapter, seed=1)

    def push(f, adapter):
        if "jvp" in case.jax_cannot:
            return ()
        return jax.jvp(lambda a: scalar(f(a)), (adapter,), (direction,))

    def everything(f, adapter):
        return f(adapter), jax.value_and_grad(lambda a: scalar(f(a)))(adapter), push(f, adapter)

    out, grad, jvp = jax.jit(functools.partial(everything, lifted))(adapter)
    out_, grad_, jvp_ = jax.jit(functools.partial(everything, plain))(adapter)
    assert_close(out, out_)
    assert_close(grad, grad_, 2e-4)
    assert_close(jvp, jvp_, 2e-4)
    for leaf in jax.tree.leaves(grad[1]):
        assert np.abs(leaf).max() > 0, "an adapter leaf gets no gradient: it is not applied"


@cases(needs="vmap")
def test_vmap_over_stacked_adapters(case):
    lifted, plain, adapter = both(case)
    adapters = [random_like(adapter, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    got = jax.jit(jax.vmap(lifted))(stacked)
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(jax.jit(plain), adapters))
    assert_close(got, want)


@cases(needs="pmap")
def test_pmap(case):
    lifted, plain, adapter = both(case)
    adapters = [random_like(adapter, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    got = jax.pmap(lifted, devices=jax.devices()[:2])(stacked)
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(jax.jit(plain), adapters))
    assert_close(got, want)


@cases
def test_eval_shape_lower_and_checkpoint(case):
    lifted, plain, adapter = both(case)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapter)
    shapes, want = jax.eval_shape(lifted, abstract), jax.eval_shape(plain, abstract)
    as_pairs = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert as_pairs(shapes) == as_pairs(want)
    compiled = jax.jit(jax.grad(jax.checkpoint(lambda a: scalar(lifted(a))))).lower(abstract)
    assert_close(
        compiled.compile()(adapter), jax.jit(jax.grad(lambda a: scalar(plain(a))))(adapter), 2e-4
    )


@cases
def test_bfloat16_base(case):
    check_16_bits(case, jnp.bfloat16)


@cases(needs="float16")
def test_float16_base(case):
    check_16_bits(case, jnp.float16)


def check_16_bits(case, dtype):
    fn, params, args, adapter = case.setup(dtype)
    got = eqx.filter_jit(lora.lift(fn))(lora.combine(params, adapter), *args)
    # The reference in float32 from the same 16-bit numbers: what both only approximate.
    wide, wide_args = cast((params, args), jnp.float32)
    want = eqx.filter_jit(fn)(lora.merge(wide, adapter), *wide_args)
    assert all(
        leaf.dtype == base.dtype
        for leaf, base in zip(
            jax.tree.leaves(got),
            jax.tree.leaves(eqx.filter_eval_shape(fn, params, *args)),
            strict=True,
        )
    )
    rough = 8 * float(jnp.finfo(dtype).eps)
    assert_close(got, want, rough * 2)


@cases
def test_x64(case):
    with jax.enable_x64(True):
        lifted, plain, adapter = both(case, dtype=jnp.float64)
        assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float64")}
        got, want = jax.jit(lambda a: (lifted(a), plain(a)))(adapter)
        floats = [leaf for leaf in jax.tree.leaves(got) if leaf.dtype == np.float64]
        assert_close(got, want, 1e-12 if len(floats) == len(jax.tree.leaves(got)) else 1e-5)

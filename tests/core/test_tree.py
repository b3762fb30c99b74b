"""combine, split, masks, merging and switching, on trees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax.adapters.lora import Axes, Lora

from .cases import random_like
from .table import cases

KEY = jax.random.key(0)


def two_layers():
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for n in ("a", "b")}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
    adapter = lora.init(KEY, lora.LoraConfig(rank=3, targets="*"), fn, params, x)
    return fn, params, x, adapter


@cases
def test_split_inverts_combine(case):
    _, params, _, adapter = case.setup()
    for key in (None, KEY):
        got_params, got_adapter = lora.split(lora.combine(params, adapter, dropout_key=key))
        assert jax.tree.structure(got_params) == jax.tree.structure(params)
        assert all(
            left is right
            for left, right in zip(
                jax.tree.leaves((got_params, got_adapter)),
                jax.tree.leaves((params, adapter)),
                strict=True,
            )
        )


@cases
def test_merge_against_numpy(case):
    _, params, _, adapter = case.setup()
    merged = lora.tree.leaves_by_path(lora.merge(params, adapter))
    for path, base in lora.tree.leaves_by_path(params).items():
        if path not in adapter:
            assert merged[path] is base
            continue
        update = adapter[path]
        names = "abcdefgh"[: base.ndim]
        of = lambda group, names=names: "".join(names[axis] for axis in group)  # noqa: E731
        batch, inputs, outputs = map(
            of, (update.axes.batch, update.axes.inputs, update.axes.outputs)
        )
        delta = np.einsum(
            f"{batch}{inputs}z,{batch}z{outputs}->{names}",
            np.asarray(update.lora_a, np.float64), np.asarray(update.lora_b, np.float64),
        )  # fmt: skip
        want = np.asarray(base, np.float64) + update.scale * delta
        np.testing.assert_allclose(merged[path], want, rtol=1e-5, atol=1e-5)


axes = st.integers(1, 4).flatmap(lambda n: st.lists(st.sampled_from("bio"), min_size=n, max_size=n))


@settings(max_examples=40, deadline=None)
@given(roles=axes, rank=st.integers(1, 3), sign=st.sampled_from([1, -1]), data=st.data())
def test_any_axes_add_up(roles, rank, sign, data):
    shape = tuple(data.draw(st.integers(1, 4)) for _ in roles)
    groups = [tuple(i for i, r in enumerate(roles) if r == kind) for kind in "bio"]
    a_shape, b_shape = lora.adapters.lora.factor_shapes(shape, Axes(*groups), rank)
    rng = np.random.default_rng(0)
    a, b, base = (rng.normal(size=s).astype(np.float32) for s in (a_shape, b_shape, shape))
    update = Lora(jnp.asarray(a), jnp.asarray(b), Axes(*groups), scale=1.5)
    assert update.shape == shape
    want = np.array(base, np.float64)
    for index in np.ndindex(*shape):
        at_b, at_i, at_o = (tuple(index[axis] for axis in group) for group in groups)
        want[index] += (
            sign * 1.5 * sum(a[(*at_b, *at_i, k)] * b[(*at_b, k, *at_o)] for k in range(rank))
        )
    np.testing.assert_allclose(update.add_to(jnp.asarray(base), sign), want, rtol=1e-4, atol=1e-5)


def test_unmerge_takes_the_adapter_out():
    _, params, _, adapter = two_layers()
    adapter = random_like(adapter)
    back = lora.unmerge(lora.merge(params, adapter), adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, params)


def test_switching_in_bfloat16_never_drifts():
    """50 rounds of adding and subtracting in place move bfloat16 weights by several per cent."""
    _, params, _, adapter = two_layers()
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    tasks = {name: random_like(adapter, seed=seed) for seed, name in enumerate(("one", "two"))}
    first = lora.switch(params, tasks, "one")
    for _ in range(50):
        lora.switch(params, tasks, "two")
        again = lora.switch(params, tasks, "one")
    jax.tree.map(np.testing.assert_array_equal, again, first)
    base = lora.switch(params, tasks, None)
    assert base.keys() == params.keys()
    assert all(base[path] is params[path] for path in params)
    with pytest.raises(KeyError, match=r"'three'.*\['one', 'two'\]"):
        lora.switch(params, tasks, "three")


def test_unmerging_a_leaf_trained_whole_is_refused():
    fn, params, x, _ = two_layers()
    config = lora.LoraConfig(rank=2, targets="a", trainable="b")
    adapter = lora.init(KEY, config, fn, params, x)
    merged = lora.merge(params, adapter)
    with pytest.raises(ValueError, match="b: .*trained whole"):
        lora.unmerge(merged, adapter)


@pytest.mark.parametrize("function", [lora.combine, lora.merge, lora.unmerge, lora.summary])
def test_an_adapter_of_other_parameters_is_refused(function):
    _, params, _, adapter = two_layers()
    with pytest.raises(ValueError, match=r"'b', which the parameters do not have.*They have: a"):
        function({"a": params["a"]}, adapter)
    with pytest.raises(ValueError, match=r"b: .*\(16, 16\).*\(16, 4\) there"):
        function({**params, "b": jnp.ones((16, 4))}, adapter)


def test_trainable_mask():
    _, params, _, adapter = two_layers()
    tree = lora.combine(params, {"a": adapter["a"]}, dropout_key=KEY)
    mask = lora.trainable_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert mask["b"] is False
    assert jax.tree.leaves(mask["a"]) == [False, True, True, False]
    assert jax.tree.leaves(mask["a"].update) == [True, True]


def test_the_base_is_shared_not_copied():
    _, params, _, adapter = two_layers()
    combined = lora.combine(params, adapter)
    assert combined["a"].base is params["a"]


def test_summary_counts():
    _, params, _, adapter = two_layers()
    summary = lora.summary(params, adapter)
    assert summary.trainable == 2 * (16 * 3 + 3 * 16)
    assert summary.total == 512
    assert [row.path for row in summary.rows] == ["a", "b"]
    assert "192 of 512 parameters train (37.5000%). The base takes 0.002 MB, 32 bits a" in str(
        summary
    )
    abstract = jax.eval_shape(lambda: params)
    assert str(lora.summary(abstract, adapter)) == str(summary)


def test_merging_under_jit():
    fn, params, x, adapter = two_layers()
    adapter = random_like(adapter)
    got = jax.jit(lambda p, a: fn(lora.merge(p, a), x))(params, adapter)
    np.testing.assert_allclose(got, fn(lora.merge(params, adapter), x), rtol=1e-5, atol=1e-5)


def test_two_leaves_of_one_path_are_refused():
    params = {"a": {"b": jnp.ones((8, 8))}, "a/b": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="Two parameters have the path 'a/b'"):
        lora.init(KEY, lora.LoraConfig(rank=2), lambda p, x: x @ p["a/b"], params, jnp.ones((1, 8)))


def test_paths_end_in_a_variable_but_keep_attributes_named_value():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Attention:
        query: jax.Array
        value: jax.Array

    plain = Attention(jnp.ones(2), jnp.ones(2))
    assert [path for path, _ in lora.tree.flatten({"a": plain})[0]] == ["a/query", "a/value"]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(path for path, _ in lora.tree.flatten(state)[0]) == ["bias", "kernel"]


def test_a_whole_leaf_takes_the_bases_dtype():
    fn, params, x, _ = two_layers()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    config = lora.LoraConfig(rank=2, targets="a", trainable="b")
    adapter = lora.init(KEY, config, fn, half, x.astype(jnp.bfloat16))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapter)
    out = lora.lift(fn)(lora.combine(half, wide), x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


def test_merging_onto_an_adapted_tree_adds_both():
    _, params, _, adapter = two_layers()
    one, two = random_like(adapter, seed=1), random_like(adapter, seed=2)
    got = lora.merge(lora.combine(params, one), two)
    want = lora.merge(lora.merge(params, one), two)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)

"""`init`: what it selects, how leaves start, and what it refuses."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapters.whole import Whole

KEY = jax.random.key(0)
X = jnp.ones((2, 32))


def fn(params, x):
    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["second"]["kernel"] * params["scale"]


def params(dtype=jnp.float32):
    return {
        "first": {"kernel": jnp.ones((32, 64), dtype), "bias": jnp.zeros(64, dtype)},
        "second": {"kernel": jnp.ones((64, 48), dtype)},
        "scale": jnp.ones((), dtype),
    }


def make(key=KEY, tree=None, **fields):
    return lora.init(key, lora.LoraConfig(**{"rank": 4, **fields}), fn, tree or params(), X)


def test_all_linear_takes_the_kernels():
    assert sorted(make()) == ["first/kernel", "second/kernel"]


def test_a_predicate_sees_path_and_leaf():
    adapter = make(targets=lambda path, leaf: path.endswith("kernel") and leaf.shape[1] == 48)
    assert list(adapter) == ["second/kernel"]


def test_adding_a_target_changes_no_others_values():
    one, two = make(targets="first/kernel"), make(targets="*/kernel")
    np.testing.assert_array_equal(one["first/kernel"].lora_a, two["first/kernel"].lora_a)
    assert not np.array_equal(two["first/kernel"].lora_a[0], two["second/kernel"].lora_a[0])


def test_every_layer_starts_differently():
    def stack(w, x):
        return jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, w)[0]

    config = lora.LoraConfig(rank=2, targets="*")
    a = lora.init(KEY, config, stack, jnp.ones((3, 32, 32)), X)[""].lora_a
    assert not np.array_equal(a[0], a[1])


def test_kaiming_and_gaussian_starts():
    kaiming = np.asarray(make(rank=16, init="kaiming", targets="second/*")["second/kernel"].lora_a)
    bound = 64**-0.5
    assert np.abs(kaiming).max() <= bound
    np.testing.assert_allclose(kaiming.std(), bound / 3**0.5, rtol=0.1)
    gaussian = np.asarray(
        make(rank=16, init="gaussian", targets="second/*")["second/kernel"].lora_a
    )
    np.testing.assert_allclose(gaussian.std(), 1 / 16, rtol=0.1)
    assert np.abs(gaussian).max() > 2.5 / 16, "a normal distribution has tails"
    for start in ("kaiming", "gaussian"):
        assert not np.any(make(init=start)["second/kernel"].lora_b)


def test_a_looked_up_table_starts_as_embeddings_do():
    table = jnp.ones((100, 40))
    config = lora.LoraConfig(rank=8, targets="*")
    update = lora.init(KEY, config, lambda t, ids: t[ids], table, jnp.arange(3))[""]
    assert update.lora_a.shape == (100, 8)
    assert not np.any(update.lora_a)
    np.testing.assert_allclose(np.std(update.lora_b), 1.0, rtol=0.15)


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", None, "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_dtype_of_the_leaves(base, asked, expected):
    adapter = make(tree=params(base), dtype=asked)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(adapter)} == {expected}


def test_abstract_arguments_serve():
    tree = jax.eval_shape(params)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    adapter = lora.init(KEY, lora.LoraConfig(rank=4), fn, tree, x)
    np.testing.assert_array_equal(adapter["first/kernel"].lora_a, make()["first/kernel"].lora_a)


def test_under_jit_it_gives_the_same_leaves():
    jitted = jax.jit(lambda key: make(key))(KEY)
    jax.tree.map(np.testing.assert_array_equal, jitted, make())


def test_overrides_give_a_weight_its_own_rank_and_scale():
    adapter = make(alpha=8, overrides={"second/*": {"rank": 2, "scaling": "rank_stabilized"}})
    assert (adapter["first/kernel"].rank, adapter["first/kernel"].scale) == (4, 2.0)
    assert adapter["second/kernel"].rank == 2
    np.testing.assert_allclose(adapter["second/kernel"].scale, 8 / 2**0.5)


def test_trainable_leaves_are_copies_that_train():
    tree = params()
    adapter = make(tree=tree, targets="first/kernel", trainable=("*/bias", "scale"))
    assert {path for path, u in adapter.items() if isinstance(u, Whole)} == {"first/bias", "scale"}
    assert (
        adapter["first/bias"].value.unsafe_buffer_pointer()
        != tree["first"]["bias"].unsafe_buffer_pointer()
    )
    grads = jax.grad(lambda a: lora.lift(fn)(lora.combine(tree, a), X).sum())(adapter)
    want = jax.grad(lambda p: fn(p, X).sum())(tree)
    np.testing.assert_allclose(grads["first/bias"].value, want["first"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(grads["scale"].value, want["scale"], rtol=1e-6)


def test_a_trainable_leaf_is_left_out_of_all_linear():
    adapter = make(trainable="second/kernel")
    assert isinstance(adapter["second/kernel"], Whole)


REFUSED = {
    "a pattern that matches nothing": (
        {"targets": "*/qkv"}, r"targets: the pattern '\*/qkv' matches none"),
    "an exclude that matches nothing": (
        {"exclude": "*/qkv"}, r"exclude: the pattern '\*/qkv' matches none"),
    "an override that matches nothing": (
        {"overrides": {"*/qkv": {"rank": 2}}}, r"overrides: the pattern '\*/qkv' matches none"),
    "a trainable that matches nothing": (
        {"trainable": "*/qkv"}, r"trainable: the pattern '\*/qkv' matches none"),
    "everything excluded": (
        {"targets": "first/kernel", "exclude": "*"}, "selects none of the 4"),
    "a predicate that selects nothing": (
        {"targets": lambda path, leaf: False}, "selects none of the 4"),
    "a target that is only added": (
        {"targets": "first/bias"}, r"first/bias: .*never multiplies.*broadcast_in_dim|"
                                   r"first/bias: .*never multiplies.*add at"),
    "a target and trainable": (
        {"targets": "*/kernel", "trainable": "second/*"}, "second/kernel: matched by .*targets"),
    "a rank above the smaller side": (
        {"rank": 49, "targets": "second/*"},
        r"second/kernel: rank 49 .*\(64, 48\).*64 x 48.* at most 48"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refusals(fields, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            make(**fields)


def test_a_leaf_that_is_not_used_is_refused():
    config = lora.LoraConfig(rank=2, targets="b")
    tree = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="b: .*never multiplies with this leaf of shape"):
        lora.init(KEY, config, lambda p, x: x @ p["a"], tree, jnp.ones((1, 8)))


def test_all_linear_of_a_function_without_products_is_refused():
    with pytest.raises(ValueError, match="multiplies with none"):
        lora.init(KEY, lora.LoraConfig(), lambda p, x: x + p, jnp.ones((2, 2)), jnp.ones((2, 2)))


def test_half_the_smaller_side_warns():
    with pytest.warns(UserWarning, match="second/kernel: rank 24 is at least half"):
        make(rank=24, targets="second/*")


def test_trainable_needs_values():
    tree = jax.eval_shape(params)
    with pytest.raises(ValueError, match=r"first/bias: trained whole.*abstract"):
        lora.init(KEY, lora.LoraConfig(rank=2, trainable="*/bias"), fn, tree, X)


@pytest.mark.parametrize("shape", [(6, 1), (1, 6)])
def test_sides_of_one_survive_reshapes(shape):
    def fn(w, x):
        return jnp.einsum("ni,iab->nab", x[:, :6], w.reshape(6, 1, 1))

    config = lora.LoraConfig(rank=1, targets="*")
    (update,) = lora.init(KEY, config, fn, jnp.ones(shape), X).values()
    assert update.axes.inputs == ((0,) if shape[0] == 6 else (1,))

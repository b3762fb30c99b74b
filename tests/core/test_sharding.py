"""Where base, adapter and optimizer state go on a mesh, from rules about paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import lora_jax as lora

from .cases import P, normal, random_like

MESH = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
)
ROWS = jax.ShapeDtypeStruct((4, 64), jnp.float32)


def heads(params, x):
    """A kernel with two out axes, one with two in axes, a stack, a bias."""
    x = jnp.einsum("bd,dnh->bnh", x, params["q"])
    x = jnp.einsum("bnh,nhd->bd", x, params["o"]) + params["bias"]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]


PARAMS = {
    "q": normal("q", 64, 4, 32) / 8,
    "o": normal("o", 4, 32, 64) / 16,
    "bias": normal("bias", 64),
    "stack": normal("stack", 3, 64, 64) / 16,
}
RULES = {
    "q": P("fsdp", "tensor"),
    "o": P("tensor", None, "fsdp"),
    "stack": P(None, "fsdp", "tensor"),
    "*": P(),
}


def make(params, **fields):
    return random_like(
        lora.init(jax.random.key(0), lora.LoraConfig(rank=3, **fields), heads, params, ROWS)
    )


def specs(tree):
    return jax.tree.map(lambda sharding: tuple(sharding.spec), tree)


def test_the_first_rule_that_matches_counts():
    found = specs(lora.params_shardings(PARAMS, MESH, RULES))
    assert found == {
        "q": ("fsdp", "tensor"),
        "o": ("tensor", None, "fsdp"),
        "bias": (),
        "stack": (None, "fsdp", "tensor"),
    }


def test_axes_that_the_mesh_does_not_have_are_passed_over():
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = {"q": P(("fsdp", "tensor")), "o": P("expert", None, "fsdp"), "*": P()}
    found = specs(lora.params_shardings(PARAMS, mesh, rules))
    assert found["q"] == ("tensor",)
    assert found["o"] == (None, None, None)


def test_rules_may_be_a_function():
    rule = lambda path, leaf: P("fsdp") if path == "q" and leaf.ndim == 3 else P()  # noqa: E731
    assert specs(lora.params_shardings(PARAMS, MESH, rule))["q"] == ("fsdp",)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"q": P()}, r"params_shardings: bias: none of the rules' patterns matches it: q\."),
        ({"bias": P(None, "fsdp")}, r"bias: its rule .* is for 2 axes, but it has 1: \(64,\)"),
        ({"q": P("fspd"), "*": P()}, r"q: axis 0: its rule .* names the mesh axis 'fspd'.*It has"),
        (
            {"stack": P("fsdp"), "*": P()},
            r"stack: axis 0 of shape \(3, 64, 64\) cannot be split over fsdp=2: expected a "
            r"multiple of 2, got 3",
        ),
        (
            {"q": P(None, None, ("data", "fsdp", "tensor")), "o": P(("data", "fsdp", "tensor"))},
            r"o: axis 0 of shape \(4, 32, 64\) cannot be split over data=2 x fsdp=2 x tensor=2",
        ),
    ],
    ids=["no rule", "too long", "unknown axis", "does not divide", "product does not divide"],
)
def test_rules_that_do_not_fit_are_errors(rules, message):
    params = dict(PARAMS) if "q" in rules else {"bias": PARAMS["bias"], **PARAMS}
    if "bias" in rules:
        params = {"bias": PARAMS["bias"]}
    elif list(rules) == ["q", "o"]:
        params = {"q": PARAMS["q"], "o": PARAMS["o"]}
    with pytest.raises(ValueError, match=message):
        lora.params_shardings(params, MESH, rules)


def test_a_block_is_never_cut():
    """64 in axes are one block of a stack's kernel, which two devices cannot share."""
    base = lora.quantize(heads, PARAMS, ROWS)
    message = r"stack: scales of its quantized form: axis 2 of shape \(3, 64, 1\).*fsdp=2.*got 1"
    with pytest.raises(ValueError, match=message):
        lora.params_shardings(base, MESH, {"stack": P(None, "fsdp"), "*": P()})


# What follows from the rules above: A has the in axes, B the out axes, both the batch axes.
FOLLOWING = {
    "q": (("fsdp", None), (None, "tensor", None)),
    "o": (("tensor", None, None), (None, "fsdp")),
    "stack": ((None, "fsdp", None), (None, None, "tensor")),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["arrays", "4-bit"])
def test_factors_take_the_partition_of_their_axes(quantized):
    adapter = make(PARAMS, trainable="bias")
    base = lora.quantize(heads, PARAMS, ROWS, block_size=32) if quantized else PARAMS
    rules = {"bias": P("tensor"), **RULES}
    following = lora.adapter_shardings(lora.params_shardings(base, MESH, rules), adapter)
    assert tuple(following.pop("bias").value.spec) == ("tensor",)
    found = {k: (tuple(u.lora_a.spec), tuple(u.lora_b.spec)) for k, u in following.items()}
    assert found == FOLLOWING


def test_partition_specs_do_too_for_shard_map():
    following = lora.adapter_shardings(RULES, make(PARAMS))
    assert following["q"].lora_a == P("fsdp", None)
    assert following["q"].lora_b == P(None, "tensor", None)


def test_arrays_in_their_places_say_where_the_adapter_goes():
    base = jax.device_put(PARAMS, lora.params_shardings(PARAMS, MESH, RULES))
    places = jax.tree.map(lambda leaf: leaf.sharding, base)
    adapter = make(base)
    placed = jax.device_put(adapter, lora.adapter_shardings(places, adapter))
    part = placed["stack"].lora_b.addressable_shards[0].data
    assert part.shape == (3, 3, 32)
    assert lora.combine(base, placed)["stack"].base is base["stack"]


@pytest.mark.parametrize("quantized", [False, True], ids=["arrays", "4-bit"])
def test_the_adapted_function_computes_the_same_on_the_mesh(quantized):
    base = PARAMS
    if quantized:
        base = lora.quantize(heads, PARAMS, ROWS, block_size=32, compute_dtype="float32")
    adapter, x = make(base), normal("x", 4, 64)
    merged = lora.merge(lora.dequantize(base), adapter)
    loss = lambda a, p: (lora.lift(heads)(lora.combine(p, a), x) ** 2).sum()  # noqa: E731
    bases = lora.params_shardings(base, MESH, RULES)
    places = lora.adapter_shardings(bases, adapter)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
    got, grads = step(jax.device_put(adapter, places), jax.device_put(base, bases))
    np.testing.assert_allclose(got, (heads(merged, x) ** 2).sum(), rtol=1e-5)
    wanted = jax.grad(loss)(adapter, base)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * np.abs(b).max()),
        grads,
        wanted,
    )
    assert jax.tree.map(lambda leaf: leaf.sharding, grads) == places


def test_what_has_no_sharding_is_an_error():
    adapter = make(PARAMS)
    with pytest.raises(ValueError, match=r"o: the adapter updates it, and .* has no sharding"):
        lora.adapter_shardings({"q": P(), "stack": P()}, adapter)
    with pytest.raises(TypeError, match=r"o: expected a NamedSharding.*SingleDeviceSharding"):
        lora.adapter_shardings(jax.tree.map(lambda leaf: leaf.sharding, PARAMS), adapter)


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "chain": optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1e-2, 0, 9))),
    "accumulated": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_where_their_leaves_lie(name):
    tx, adapter = OPTIMIZERS[name], make(PARAMS)
    places = lora.adapter_shardings(lora.params_shardings(PARAMS, MESH, RULES), adapter)
    placed = jax.device_put(adapter, places)
    shardings = lora.optimizer_shardings(tx, adapter, places)
    state = jax.jit(tx.init, out_shardings=shardings)(placed)
    moments = [node for node in jax.tree.leaves(state, is_leaf=is_adapter) if is_adapter(node)]
    assert moments
    for moment in moments:
        assert jax.tree.map(lambda leaf: leaf.sharding, moment) == places
    # And stay there in a step, whose numbers are those of one device.
    grads = jax.tree.map(jnp.cos, adapter)
    step = jax.jit(tx.update, out_shardings=(places, shardings))
    for got, wanted in zip(
        step(jax.device_put(grads, places), state, placed),
        tx.update(grads, tx.init(adapter), adapter),
        strict=True,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted)


def is_adapter(node):
    return isinstance(node, dict) and "q" in node


def test_moments_that_are_factored_are_on_every_device():
    tx, adapter = optax.adafactor(1e-2), make(PARAMS)
    places = lora.adapter_shardings(lora.params_shardings(PARAMS, MESH, RULES), adapter)
    shardings = lora.optimizer_shardings(tx, adapter, places)
    state = jax.jit(tx.init, out_shardings=shardings)(adapter)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(adapter))


def test_state_in_host_memory_stays_there():
    tx, adapter = lora.offload(optax.adam(1e-2)), make(PARAMS)
    places = lora.adapter_shardings(lora.params_shardings(PARAMS, MESH, RULES), adapter)
    shardings = lora.optimizer_shardings(tx, adapter, places)
    moments = jax.tree.leaves(shardings[0].mu)
    assert {sharding.memory_kind for sharding in moments} == {"pinned_host"}
    assert specs(shardings[0].mu) == specs(places)
    assert shardings[0].count.memory_kind != "pinned_host"


@pytest.mark.parametrize("axes", [((0,), (1,), (2, 3)), ((2,), (3, 0), (1,)), ((), (1, 2), (0, 3))])
def test_the_partition_of_codes_says_that_of_the_weight(axes):
    from lora_jax.adapters.lora import Axes
    from lora_jax.quantization.formats import Format
    from lora_jax.quantization.quantized import quantize_array

    weight = quantize_array(normal("w", 4, 32, 32, 4), Axes(*axes), Format(block_size=32))
    spec = P("a", None, "b", "c")
    # The in axes after the first are flattened into it, and not split.
    for axis in axes[1][1:]:
        spec = P(*(None if at == axis else name for at, name in enumerate(spec)))
    assert weight.unpartitioned(weight.partition(spec).codes) == spec


EXPLICIT = jax.make_mesh(
    (4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
)


def columns(p, x):
    return x @ p["w"]


def rows(p, x):
    numbers = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, p["w"], numbers, out_sharding=P("fsdp", None))


def mlp(p, x):
    hidden = jax.nn.relu(x @ p["up"])
    return jnp.einsum("bf,fd->bd", hidden, p["down"], out_sharding=P("fsdp", None))


def gathered(p, x):
    return x @ jax.sharding.reshard(p["w"], P(None, "tensor"))


def several(p, x):
    return jnp.einsum("bd,dnh->bnh", x, p["w"], out_sharding=P("fsdp", "tensor", None))


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def looked_up(p, ids):
    rows = p["table"].at[ids].get(out_sharding=P("fsdp", None, "tensor"))
    return jnp.einsum("bld,df->blf", rows, p["w"], out_sharding=P("fsdp", None, None))


def convolved(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=numbers)


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 6)))
X, SIGNAL = normal("rows", 8, 64), normal("signal", 8, 10, 64)
# What JAX itself lets a function do on such a mesh, and how its weights are split.
EXPLICIT_CASES = [
    (columns, {"w": normal("w", 64, 128)}, X, {"*": P(None, "tensor")}),
    (rows, {"w": normal("w", 64, 128)}, X, {"*": P("tensor", None)}),
    (mlp, {"up": normal("up", 64, 128), "down": normal("down", 128, 64)}, X,
     {"up": P(None, "tensor"), "down": P("tensor", None)}),
    (gathered, {"w": normal("w", 256, 128)}, normal("wide", 8, 256), {"*": P("fsdp", "tensor")}),
    (several, {"w": normal("w", 64, 4, 32)}, X, {"*": P(None, "tensor", None)}),
    (scanned, {"w": normal("w", 3, 64, 64)}, X, {"*": P()}),
    (looked_up, {"table": normal("t", 64, 64), "w": normal("w", 64, 64)}, IDS,
     {"table": P(None, "tensor"), "w": P("tensor", None)}),
    (convolved, {"w": normal("w", 3, 64, 8)}, SIGNAL, {"*": P()}),
]  # fmt: skip


ONE = jax.make_mesh((1, 1), EXPLICIT.axis_names, axis_types=EXPLICIT.axis_types)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("quantized", [False, True], ids=["arrays", "4-bit"])
@pytest.mark.parametrize("case", EXPLICIT_CASES, ids=lambda case: case[0].__name__)
def test_explicit_meshes(case, quantized):
    fn, params, x, rules = case
    config = lora.LoraConfig(rank=3, targets="*")
    with jax.set_mesh(ONE):  # Where nothing is split.
        base = params
        if quantized:
            base = lora.quantize(fn, params, x, block_size=32, compute_dtype="float32")
        adapter = random_like(lora.init(jax.random.key(0), config, fn, params, x))
        merge = lambda a: lora.merge(lora.dequantize(base), a)  # noqa: E731
        wanted = fn(merge(adapter), x)
        wanted_grads = jax.grad(lambda a: (fn(merge(a), x) ** 2).sum())(adapter)
        host = jax.tree.map(np.asarray, (base, adapter, params, x))
    with jax.set_mesh(EXPLICIT):
        base, adapter, params, x = host
        bases = lora.params_shardings(base, EXPLICIT, rules)
        places = lora.adapter_shardings(bases, adapter)
        placed, on_mesh = jax.device_put((base, adapter), (bases, places))
        split = jax.device_put(x, NamedSharding(EXPLICIT, P("fsdp")))
        lifted = lambda a, p, x: lora.lift(fn)(lora.combine(p, a), x)  # noqa: E731
        got = jax.jit(lifted)(on_mesh, placed, split)
        grads = jax.jit(jax.grad(lambda *args: (lifted(*args) ** 2).sum()))(on_mesh, placed, split)
        plain = jax.device_put(params, lora.params_shardings(params, EXPLICIT, rules))
        assert jax.typeof(got).sharding == jax.typeof(jax.jit(fn)(plain, split)).sharding
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3 * np.abs(b).max())

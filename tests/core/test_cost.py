"""What the compiled step costs, by XLA's own deterministic count."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from programs import (
    BATCH,
    LAYERS,
    RANK,
    WIDTH,
    dense_stack,
    dense_stack_arguments,
    dense_stack_steps,
)


@pytest.fixture(scope="module")
def steps():
    return dense_stack_steps()


def flops(step):
    return step.cost_analysis()["flops"]


def test_flops_are_those_of_the_program_written_by_hand(steps):
    assert flops(steps["lifted"]) <= 1.01 * flops(steps["by hand"])
    # Two thirds of full training, and the adapter's own: 2 - 1/L + 6 r/d forwards. That counts
    # products; the rest is less than one operation for each activation.
    bound = 2 - 1 / LAYERS + 6 * RANK / WIDTH
    activations = LAYERS * BATCH * WIDTH
    assert flops(steps["lifted"]) <= bound * flops(steps["forward"]) + activations
    assert flops(steps["full"]) > 2.8 * flops(steps["forward"])


def test_memory_is_that_of_the_program_written_by_hand(steps):
    lifted, by_hand = (steps[name].memory_analysis() for name in ("lifted", "by hand"))
    assert lifted.temp_size_in_bytes <= 1.02 * by_hand.temp_size_in_bytes
    adapter = LAYERS * 2 * WIDTH * RANK * 4
    assert lifted.output_size_in_bytes < adapter + 4096


def test_nothing_in_the_step_has_the_size_of_a_frozen_weight(steps):
    made = re.findall(r"= f32\[(\d+(?:,\d+)*)\]\S* (\w[\w-]*)\(", steps["lifted"].as_text())
    sizes = [
        (kind, jnp.prod(jnp.array([int(n) for n in shape.split(",")]))) for shape, kind in made
    ]
    assert BATCH < WIDTH, "activations must be smaller than a weight for this test to see one"
    large = {kind for kind, size in sizes if size >= WIDTH * WIDTH}
    assert large == {"parameter"}


def test_a_custom_vjp_step_forms_no_weight_gradient():
    """The rule asks for the whole gradient; A and B need only thin products of its factors."""

    @jax.custom_vjp
    def project(x, w):
        return jnp.einsum("btd,dh->bth", x, w)

    def backward(saved, g):
        x, w = saved
        return jnp.einsum("bth,dh->btd", g, w), jnp.einsum("btd,bth->dh", x, g)

    project.defvjp(lambda x, w: (project(x, w), (x, w)), backward)
    fn = lambda w, x: project(jnp.tanh(x), w)  # noqa: E731
    w, x = jax.ShapeDtypeStruct((512, 640), jnp.float32), jnp.zeros((2, 8, 512))
    config = lora.LoraConfig(rank=2, targets="*")
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), config, fn, w, x))

    def loss(adapter, w, x):
        return jnp.sin(lora.lift(fn)(lora.combine(w, adapter), x)).sum()

    step = jax.jit(jax.grad(loss)).lower(adapter, w, x).compile()
    forward = 2 * 16 * 512 * 640
    assert flops(step) < 1.1 * forward  # x needs no gradient, w gets none.
    assert step.memory_analysis().temp_size_in_bytes < 512 * 640 * 4


def test_scanned_layers_form_no_dense_weight():
    def fn(w, x):
        return jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, w)[0]

    w = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    config = lora.LoraConfig(rank=4, targets="*")
    adapter = jax.eval_shape(
        lambda: lora.init(jax.random.key(0), config, fn, w, jnp.zeros(x.shape))
    )
    lifted = lora.lift(fn)
    step = jax.jit(jax.grad(lambda a, w, x: (lifted(lora.combine(w, a), x) ** 2).sum()))
    memory = step.lower(adapter, w, x).compile().memory_analysis()
    one_layer = 256 * 256 * 4
    # XLA's own loop keeps one sliced layer; a second would be a dense `W + A B` or a gradient.
    assert memory.temp_size_in_bytes < 2 * one_layer


def test_merged_the_program_is_the_base_models_own():
    params, adapter, _, x = dense_stack_arguments()
    merged = jax.eval_shape(lora.merge, params, adapter)
    texts = [jax.jit(dense_stack).lower(tree, x).compile().as_text() for tree in (params, merged)]
    assert texts[0] == texts[1]


def test_functions_that_no_adapter_reaches_keep_their_program():
    """Lifted over plain arrays, a function is bound again unchanged."""
    params, _, _, x = dense_stack_arguments()
    texts = [
        jax.jit(function).lower(params, x).as_text()
        for function in (dense_stack, lora.lift(dense_stack))
    ]
    strip = lambda text: re.sub(r"module @\S+", "", text)  # noqa: E731
    assert strip(texts[0]) == strip(texts[1])

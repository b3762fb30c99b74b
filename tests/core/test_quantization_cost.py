"""What quantized weights take, counted from their arrays and by XLA on the compiled program."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import Format
from lora_jax.quantization.quantized import quantize_array

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from programs import (
    LAYERS,
    QUANTIZED_WIDTH,
    base_argument_bytes,
    frozen_stack,
    frozen_step,
)

ONE_LAYER = QUANTIZED_WIDTH**2


@pytest.fixture(scope="module")
def weight():
    return jax.random.normal(jax.random.key(0), (4096, 4096))


def quantized(weight, format):
    return quantize_array(weight, Axes((), (0,), (1,)), format)


@pytest.mark.parametrize(
    ("format", "bits", "error"),
    [
        # A scale of 8 bits for 64, and one of 32 bits for 64 * 256: 4.127 (arXiv:2305.14314).
        (Format(), 4.127, 0.0920),
        (Format(double_quant=False), 4.5, 0.0920),
        (Format("fp4"), 4.127, 0.1220),
    ],
    ids=str,
)
def test_four_bits_take_and_lose_what_is_published(weight, format, bits, error):
    four = quantized(weight, format)
    taken = 8 * sum(array.nbytes for array in jax.tree.leaves(four)) / weight.size
    assert abs(taken - bits) < 1e-3
    assert 8 * four.nbytes / weight.size == taken
    lost = jnp.linalg.norm(weight - four.form("float32")) / jnp.linalg.norm(weight)
    assert abs(float(lost) - error) < 1e-4


def test_eight_bits_take_and_lose_what_a_uniform_step_does(weight):
    eight = quantized(weight, Format("int8"))
    assert sum(array.nbytes for array in jax.tree.leaves(eight)) == 4096 * 4096 + 4 * 4096
    # Uniform in a step: its variance is step^2 / 12.
    steps = np.abs(np.asarray(weight, np.float64)).max(0) / 127
    expected = np.sqrt(np.mean(steps**2) / 12 / np.mean(np.asarray(weight, np.float64) ** 2))
    lost = jnp.linalg.norm(weight - eight.form("float32")) / jnp.linalg.norm(weight)
    np.testing.assert_allclose(lost, expected, rtol=2e-3)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def steps(request):
    """The stack, and its compiled step on a dense and on a 4-bit base, layers scanned."""
    stack = frozen_stack(request.param)
    return stack, {kind: frozen_step(stack, kind) for kind in ("dense", "nf4")}


def test_the_base_takes_0_26_of_what_bfloat16_takes(steps):
    stack, compiled = steps
    dense, four = (base_argument_bytes(stack, compiled[kind]) for kind in ("dense", "nf4"))
    assert dense == LAYERS * ONE_LAYER * jnp.dtype(stack.x.dtype).itemsize
    assert four <= 0.26 * LAYERS * ONE_LAYER * 2


def test_temporaries_exceed_those_of_a_dense_base_by_one_layer_at_most(steps):
    stack, compiled = steps
    dense, four = (compiled[kind].memory_analysis().temp_size_in_bytes for kind in ("dense", "nf4"))
    assert four <= dense + ONE_LAYER * jnp.dtype(stack.x.dtype).itemsize


def elements(compiled):
    """The size of every array that is named in a compiled program, those in loops included."""
    shapes = re.findall(r"\b[a-z]+\d+\[(\d[\d,]*)\]", compiled.as_text())
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


def test_no_array_of_the_step_has_the_size_of_the_stack(steps):
    _, compiled = steps
    stack = LAYERS * ONE_LAYER
    assert max(elements(compiled["dense"])) == stack
    assert max(elements(compiled["nf4"])) == stack // 2  # The codes, two a byte.


def test_no_array_of_the_forward_has_the_size_of_the_stack():
    stack = frozen_stack("float32")
    for kind, size in (("dense", LAYERS * ONE_LAYER), ("nf4", LAYERS * ONE_LAYER // 2)):
        forward = jax.jit(lambda a, kernels, x: stack.forward(lora.combine(kernels, a), x))
        compiled = forward.lower(stack.adapter, stack.kernels[kind], stack.x).compile()
        assert max(elements(compiled)) == size


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_the_forward_keeps_codes_for_the_backward_pass_and_no_formed_weight(scan):
    # So few rows that all layers' activations together are smaller than a weight.
    stack = frozen_stack("float32", scan=scan, batch=32)

    def kept(kind):
        def backward(adapter, kernels, x):
            return jax.vjp(lambda adapter: stack.loss(adapter, kernels, x), adapter)[1]

        arrays = jax.tree.leaves(
            jax.eval_shape(backward, stack.adapter, stack.kernels[kind], stack.x)
        )
        large = [a for a in arrays if a.size >= ONE_LAYER // 2]
        return {(a.dtype.name, math.prod(a.shape[-2:])) for a in large}

    assert kept("dense") == {("float32", ONE_LAYER)}
    assert kept("nf4") == {("uint8", ONE_LAYER // 2)}

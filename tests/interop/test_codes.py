"""Codes and scales equal to those of bitsandbytes, on the transposed weight."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import FP4, NF4, Format, dynamic_map, midpoints
from lora_jax.quantization.quantized import quantize_array

PLAIN = Axes((), (0,), (1,))


@pytest.fixture(scope="module")
def weight():
    """A kernel `[in, out]`, of the spread of a real one."""
    return (0.02 * np.random.default_rng(0).normal(size=(1024, 768))).astype(np.float32)


@pytest.mark.parametrize(("name", "codes"), [("nf4", NF4), ("fp4", FP4)])
def test_tables(name, codes):
    theirs = bnb.get_4bit_type(name, device="cpu").numpy()
    np.testing.assert_array_equal(np.float32(codes), theirs)
    ordered = np.sort(theirs)
    np.testing.assert_array_equal(midpoints(codes), (ordered[1:] + ordered[:-1]) / 2)
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_and_absmax(weight, name, block, dtype):
    given = torch.from_numpy(weight.T.copy()).to(getattr(torch, dtype))
    packed, state = bnb.quantize_4bit(given, blocksize=block, quant_type=name)
    same = given.float().numpy().T
    ours = quantize_array(same, PLAIN, Format(name, block, double_quant=False))
    np.testing.assert_array_equal(np.asarray(ours.codes).T.reshape(-1, 1), packed.numpy())
    np.testing.assert_array_equal(np.asarray(ours.scales).reshape(-1), state.absmax.numpy())
    dense = bnb.dequantize_4bit(packed, state).float().numpy().T
    cast = np.asarray(ours.form("float32"))
    if dtype == "float32":
        np.testing.assert_array_equal(cast, dense)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization(weight, name):
    given = torch.from_numpy(weight.T.copy())
    _, state = bnb.quantize_4bit(given, blocksize=64, quant_type=name, compress_statistics=True)
    ours = quantize_array(weight, PLAIN, Format(name))
    assert ours.nested is not None
    # The mean is a sum of thousands of numbers, whose order is free.
    np.testing.assert_allclose(ours.nested.mean, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.nested.absmax, state.state2.absmax.numpy(), rtol=1e-6)
    mine, theirs = np.asarray(ours.scales).reshape(-1), state.absmax.numpy()
    # Theirs looks up in a coarser table, so that now and then it is not the nearest.
    assert np.mean(mine == theirs) >= 0.997
    plain = quantize_array(weight, PLAIN, Format(name, double_quant=False))
    exact = np.asarray(plain.scales).reshape(-1)
    block_absmax = np.repeat(np.asarray(ours.nested.absmax), 256)[: exact.size]
    target = (exact - np.float32(ours.nested.mean)) / block_absmax
    off = mine != theirs
    distance = lambda codes: np.abs(dynamic_map()[codes[off]] - target[off])  # noqa: E731
    assert (distance(mine) <= distance(theirs) * (1 + 1e-5)).all()
    # One off, but near zero, where the map is so fine that a little error is some steps.
    far = np.abs(mine[off].astype(int) - theirs[off].astype(int)) > 1
    assert (np.abs(target[off][far]) < 1e-4).all()


@pytest.mark.parametrize(("name", "error"), [("nf4", 0.0920), ("fp4", 0.1220)])
@pytest.mark.parametrize("double", [True, False])
def test_relative_error_on_gaussian_weights(weight, name, error, double):
    formed = quantize_array(weight, PLAIN, Format(name, 64, double)).form("float32")
    got = np.linalg.norm(formed - weight) / np.linalg.norm(weight)
    np.testing.assert_allclose(got, error, atol=2e-4)

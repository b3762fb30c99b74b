"""Checksums: against arithmetic written out, on every mesh, and changed by every damage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.checkpoint.checksum import checksums

from .cases import P, normal

EVERY = 2**32


def mix(word):
    word = (word ^ word >> 16) * 0x7FEB352D % EVERY
    word = (word ^ word >> 15) * 0x846CA68B % EVERY
    return word ^ word >> 16


def written_out(array):
    """sum_i mix(w_i xor mix(i)) modulo 2^32 over the words of an array, in Python's integers."""
    words = np.ascontiguousarray(array).reshape(-1)
    words = words.view(f"uint{8 * words.dtype.itemsize}").tolist()
    return sum(mix(word ^ mix(index)) for index, word in enumerate(words)) % EVERY


ARRAYS = {
    "float32": normal("a", 4, 6, 8),
    "bfloat16": normal("b", 8, 8).astype(jnp.bfloat16),
    "float16": normal("c", 8, 4).astype(jnp.float16),
    "int8": jnp.arange(-64, 64, dtype=jnp.int8).reshape(8, 16),
    "bool": jnp.arange(64).reshape(8, 8) % 3 == 0,
    "scalar": jnp.float32(0.5),
}


def test_they_are_what_the_formula_says():
    got = checksums(ARRAYS)
    wanted = [written_out(ARRAYS[name]) for name in sorted(ARRAYS)]
    assert np.asarray(got).tolist() == wanted


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_they_are_the_same_on_every_mesh(axis_type):
    wanted = np.asarray(checksums(ARRAYS))
    for shape in ((4, 1), (2, 2)):
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(axis_type,) * 2)
        placed = {
            name: jax.device_put(
                array, jax.sharding.NamedSharding(mesh, P(*("a", None, "b")[-array.ndim or 3 :]))
            )
            for name, array in ARRAYS.items()
        }
        got = checksums(placed)
        assert got.sharding.is_fully_replicated
        np.testing.assert_array_equal(got, wanted)


def test_every_flipped_bit_every_pair_of_signs_and_every_swap_changes_them():
    words = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    damaged = []
    for place in range(12):
        for bit in range(32):
            flipped = words.copy().view(np.uint32).reshape(-1)
            flipped[place] ^= np.uint32(1 << bit)
            damaged.append(flipped.view(np.float32).reshape(3, 4))
        for other in range(place):
            swapped = words.copy().reshape(-1)
            swapped[[place, other]] = swapped[[other, place]]
            damaged.append(swapped.reshape(3, 4))
            signs = np.ones(12, np.float32)
            signs[[place, other]] = -1
            damaged.append(words * signs.reshape(3, 4))
    got = np.concatenate([checksums({"w": jnp.asarray(array)}) for array in damaged])
    assert len(got) == 12 * 32 + 2 * 66
    assert written_out(words) not in got.tolist()


def test_words_of_eight_bytes_and_complex_numbers_have_both_halves():
    x = np.random.default_rng(0).normal(size=6)
    low, high = (x.view(np.uint64) ^ np.uint64(bit) for bit in (1, 1 << 63))
    z = x[::2] + 1j * x[1::2]
    with jax.enable_x64():
        arrays = map(jnp.asarray, (x, low.view(float), high.view(float), z, z.conj(), 1j * z))
        got = checksums({str(number): array for number, array in enumerate(arrays)})
    assert len(set(np.asarray(got).tolist())) == 6

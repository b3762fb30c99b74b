"""At the start of training the adapted function is the function."""

from __future__ import annotations

import equinox as eqx
import jax
import numpy as np

import lora_jax as lora

from .cases import KEY
from .table import cases


@cases
def test_it_is_the_base_bit_for_bit(case):
    fn, params, args = case.build()
    arrays, static = eqx.partition(params, eqx.is_array)

    @jax.jit
    def run(arrays, args):
        params = eqx.combine(arrays, static)
        adapter = lora.init(KEY, case.config, fn, params, *args)
        return lora.lift(fn)(lora.combine(params, adapter), *args), fn(params, *args)

    # Without the passes that choose another way to round when one more addition stands there.
    options = {"xla_disable_hlo_passes": "fusion,cpu-instruction-fusion,instruction-fusion,algsimp"}
    got, want = run.lower(arrays, args).compile(compiler_options=options)(arrays, args)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)

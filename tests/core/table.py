"""The table of cases, as pytest parameters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import model_cases  # noqa: F401  (adds the models to the table)
from .cases import CASES


def cases(test=None, *, needs: str = ""):
    """Runs a test on every case for which JAX can do what the test needs."""
    if test is None:
        return functools.partial(cases, needs=needs)
    chosen = [case for case in CASES.values() if needs not in case.jax_cannot]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)(test)


def scalar(outputs):
    """A number that depends on every output in a nonlinear way."""
    return sum(jnp.sin(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))).sum()
               for leaf in jax.tree.leaves(outputs))  # fmt: skip


def assert_close(got, want, tolerance=2e-5):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for left, right in zip(got, want, strict=True):
        left, right = (np.asarray(x, np.float64) for x in (left, right))
        assert left.shape == right.shape
        bound = tolerance * max(1e-3, np.abs(right).max(initial=0))
        np.testing.assert_allclose(left, right, rtol=0, atol=bound)

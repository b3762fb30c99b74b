"""The table of cases, as pytest parameters."""

from __future__ import annotations

import functools

import pytest

from . import model_cases  # noqa: F401  (adds the models to the table)
from .cases import CASES


def cases(test=None, *, needs: str = ""):
    """Runs a test on every case for which JAX can do what the test needs."""
    if test is None:
        return functools.partial(cases, needs=needs)
    chosen = [case for case in CASES.values() if needs not in case.jax_cannot]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)(test)
